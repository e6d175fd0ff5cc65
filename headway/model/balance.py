"""Keeping experts evenly loaded: the auxiliary losses and bias rules, as pure functions of what a
router returns.

H heads · E experts per head · K chosen. Nothing here is attached by side effect: the loop adds
`balance_loss` to the loss in one line and calls `update_bias` once per optimiser step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headway.config import BalanceConfig


class RouteStats(NamedTuple):
    """What a sparse layer tells about one forward pass over T tokens."""

    counts_HE: Tensor
    """Rows that chose each expert, before any capacity drop; float32 `[H, E]`, no gradient."""
    prob_HE: Tensor
    """Mean over tokens of the scores normalised to sum 1; `[H, E]`, with gradient."""
    z_H: Tensor
    """Mean over tokens of logsumexp(logits)²; `[H]`, with gradient."""
    entropy_H: Tensor
    """Mean over tokens of the entropy of the normalised scores, over log E: 1.0 is undecided;
    `[H]`.
    """
    dropped: Tensor
    """Share of slots dropped by the capacity, scalar."""
    quantile_HE: Tensor | None
    """Quantile balancing's correction c_e, `[H, E]`; None under other rules."""

    def detach(self) -> "RouteStats":
        """The same numbers without gradient."""
        return self.map(Tensor.detach)

    def map(self, change: Callable[[Tensor], Tensor]) -> "RouteStats":
        """Every tensor changed."""
        return RouteStats(
            counts_HE=change(self.counts_HE),
            prob_HE=change(self.prob_HE),
            z_H=change(self.z_H),
            entropy_H=change(self.entropy_H),
            dropped=change(self.dropped),
            quantile_HE=None if self.quantile_HE is None else change(self.quantile_HE),
        )


def aux_loss(counts_HE: Tensor, prob_HE: Tensor) -> Tensor:
    """E · Σ_e f_e·P_e, averaged over heads; 1.0 when balanced (Switch Transformer, arXiv 2101.03961
    eq. 4).

    f_e is the share of rows that chose expert e, so its K-fold sum over experts is 1.
    """
    f_HE = counts_HE / counts_HE.sum(-1, keepdim=True).clamp(min=1)
    return prob_HE.shape[-1] * (f_HE * prob_HE).sum(-1).mean()


def balance_loss(
    stats: Sequence[RouteStats], config: BalanceConfig, running: list[Tensor] | None = None
) -> Tensor:
    """The auxiliary and z-loss of all layers, weighted and averaged over layers; scalar.

    Args:
        running: for `aux_scope = global_batch`, the counts of the optimiser step's earlier
        micro-batches, one per layer.
            This call adds its own counts to it in place. None means that the micro-batch is the
            whole step.
    """
    if not stats:
        return torch.zeros(())
    total = stats[0].prob_HE.new_zeros(())
    for layer, s in enumerate(stats):
        counts = s.counts_HE
        if running is not None and config.aux_scope == "global_batch":
            running[layer] = counts = running[layer] + counts
        if config.aux:
            total = total + config.aux * aux_loss(counts, s.prob_HE)
        if config.z:
            total = total + config.z * s.z_H.mean()
    return total / len(stats)


def quantile_margin(scores_THE: Tensor, bias_HE: Tensor, top_k: int) -> Tensor:
    """c_e, the (q+1)-th largest margin of expert e, q = K·T/E its fair share; `[H, E]` (arXiv
    2607.24653).

    The margin of a token is its biased score minus the (K+1)-th largest of the row: expert e is
    chosen iff it is positive. Subtracting c_e from the bias would have given every expert its fair
    share on these tokens.
    """
    T, _, E = scores_THE.shape
    if top_k >= E or T == 0:
        return torch.zeros_like(bias_HE)
    biased = scores_THE.detach() + bias_HE
    alpha = biased.topk(top_k + 1, dim=-1).values[..., -1:]
    q = min(round(top_k * T / E), T - 1)
    return (biased - alpha).kthvalue(T - q, dim=0).values


def new_bias(bias_HE: Tensor, stats: RouteStats, config: BalanceConfig) -> Tensor:
    """The selection bias after one optimiser step, given the step's counts (summed) and quantiles
    (averaged); `[H, E]`.

    `sign`: b += u·sign(mean load − load), then centred (arXiv 2408.15664 §2; centring as Moonlight
    2502.16982 App. C).
    `quantile`: b −= c, then centred.
    """
    if config.bias == "sign":
        step = (
            torch.sign(stats.counts_HE.mean(-1, keepdim=True) - stats.counts_HE) * config.bias_rate
        )
    elif config.bias == "quantile":
        assert stats.quantile_HE is not None
        step = -stats.quantile_HE
    else:
        return bias_HE
    return bias_HE + step - step.mean(-1, keepdim=True)


def merge_stats(parts: Sequence[RouteStats]) -> RouteStats:
    """The statistics of one layer over several equal parts of a batch: counts summed, the rest
    averaged."""
    if len(parts) == 1:
        return parts[0]

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).mean(0)

    return RouteStats(
        counts_HE=torch.stack([p.counts_HE for p in parts]).sum(0),
        prob_HE=mean([p.prob_HE for p in parts]),
        z_H=mean([p.z_H for p in parts]),
        entropy_H=mean([p.entropy_H for p in parts]),
        dropped=mean([p.dropped for p in parts]),
        quantile_HE=None
        if parts[0].quantile_HE is None
        else mean([p.quantile_HE for p in parts if p.quantile_HE is not None]),
    )
