"""Keeping experts evenly loaded: the auxiliary losses and bias rules, as pure functions of what a
router returns.

H heads · E experts per head · K chosen · Q bins of a histogram. Nothing here is attached by side
effect: the loop adds `balance_loss` to the loss in one line and moves the biases (`new_bias`) once
per optimiser step.

No rule depends on how a step's batch is cut into micro-batches, chunks and ranks: each reads what
adds up over the cuts (counts, means of equal parts), the step before, or single sequences, which
are never cut."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from headway.config import BalanceConfig, UsageError
from headway.kernels.permute import count


class RouteReport(NamedTuple):
    """What a sparse layer did with each of T tokens, without gradient; what was not asked for is
    None."""

    index_THK: Tensor
    """int64 `[T, H, K]`, best first, before any slot is dropped; from E on for an expert that does
    nothing."""
    gate_THK: Tensor
    """float32 `[T, H, K]`."""
    logits_THE: Tensor | None = None
    """float32 `[T, H, E]`, as the selection read them, before its bias."""
    norm_TH: Tensor | None = None
    """‖y‖ of the experts' output of each sub-token, float32 `[T, H]`."""


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
    `[H]`."""
    dropped: Tensor
    """Share of slots dropped by the capacity, scalar."""
    aux_H: Tensor | None = None
    """`aux_loss` of each sequence by its own load, mean over sequences; `[H]`, with gradient. None
    unless `aux_scope` is `sequence`."""
    margins_HEQ: Tensor | None = None
    """Histogram of the margins (`margin_counts`), int32 `[H, E, Q]`; None unless `bias` is
    `quantile`."""
    report: RouteReport | None = None
    """Token by token, where `Context.report` asks for it; no sum or mean keeps it."""

    def detach(self) -> "RouteStats":
        """The same numbers without gradient."""
        return self.map(Tensor.detach)

    def map(self, change: Callable[[Tensor], Tensor]) -> "RouteStats":
        """Apply `change` to every statistic, and drop the report."""
        return _stats({name: change(x) for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics that are there, by name."""
        return {k: x for k, x in self._asdict().items() if k != "report" and x is not None}


def _stats(tensors: dict[str, Tensor]) -> RouteStats:
    return RouteStats(**tensors)  # type: ignore[arg-type]


SUMMED = ("counts_HE", "margins_HEQ")
"""Statistics that are sums over tokens; the others are means."""


def aux_loss(counts_HE: Tensor, prob_HE: Tensor) -> Tensor:
    """Return E · Σ_e f_e·P_e of each head, 1.0 when balanced; `[H]` (Switch Transformer, arXiv
    2101.03961 eq. 4).

    f_e is the share of rows that chose expert e, so its K-fold sum over experts is 1."""
    f_HE = counts_HE / counts_HE.sum(-1, keepdim=True).clamp(min=1)
    return prob_HE.shape[-1] * (f_HE * prob_HE).sum(-1)


def balance_loss(
    stats: Sequence[RouteStats], config: BalanceConfig, load: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the auxiliary and z-loss of all layers, weighted and averaged over layers; scalar.

    Args:
        load: rows per expert `[H, E]`, one per layer, which the auxiliary loss of `global_batch`
            reads. The training loop gives those of the step before, the same for all micro-batches
            and ranks. None: the rows of `stats` themselves, for a loop of your own in which they
            are those of a whole step.
    Raises: UsageError where `config` counts by sequence and the layers do not."""
    if not stats:
        return torch.zeros(())
    total = stats[0].prob_HE.new_zeros(())
    counts = [s.counts_HE for s in stats] if load is None else load
    alike: dict[torch.Size, list[int]] = {}
    for layer, s in enumerate(stats):
        alike.setdefault(s.prob_HE.shape, []).append(layer)
    for layers in alike.values():  # all layers of one size at once
        if config.aux and config.aux_scope == "sequence":
            by_head = [aux_H for i in layers if (aux_H := stats[i].aux_H) is not None]
            if len(by_head) < len(layers):
                raise UsageError(
                    "aux_scope=sequence in the balance loss, and the layer was built with "
                    "another balance; give both the same BalanceConfig"
                )
            total = total + (config.aux * torch.stack(by_head).mean(-1)).sum()
        elif config.aux:
            prob = torch.stack([stats[i].prob_HE for i in layers])
            aux = aux_loss(torch.stack([counts[i] for i in layers]), prob)
            total = total + (config.aux * aux.mean(-1)).sum()
        if config.z:
            total = total + (config.z * torch.stack([stats[i].z_H for i in layers]).mean(-1)).sum()
    return total / len(stats)


N_BINS = 512
"""Q. Away from 0 a bin is 5% of its margin wide; within 1e-3 of 0 it is 5e-5 wide."""
FINEST, LARGEST = 1e-3, 1e2
"""Margins between which the width of bins grows with the margin; those over LARGEST count as it."""


def margin_counts(scores_THE: Tensor, bias_HE: Tensor, top_k: int) -> Tensor:
    """Return how many tokens have their margin of an expert in each of Q bins; int32 `[H, E, Q]`.

    The margin of a token is its biased score minus the (K+1)-th largest of the row: expert e is
    chosen iff it is positive. Counts add up over micro-batches and ranks, quantiles do not."""
    T, H, E = scores_THE.shape
    if top_k >= E or T == 0:  # every expert is chosen: no margin says anything
        return torch.zeros(H, E, N_BINS, dtype=torch.int32, device=scores_THE.device)
    biased = scores_THE.detach() + bias_HE
    margin_THE = biased - biased.topk(top_k + 1, dim=-1).values[..., -1:]
    first_E = torch.arange(E, device=biased.device) * N_BINS
    # head by head: the numbers of bins are 64 bits wide
    counts = [count(_bin(m_TE) + first_E, E * N_BINS) for m_TE in margin_THE.unbind(1)]
    return torch.stack(counts).view(H, E, N_BINS).int()


def quantile_margin(margins_HEQ: Tensor, rows_HE: Tensor) -> Tensor:
    """Return c_e, the margin of expert e that as many tokens exceed as its fair share of rows;
    float64 `[H, E]` (arXiv 2607.24653). 0 where no token was counted.

    Subtracting c_e from the bias would have given every expert its fair share on these tokens.
    Between the edges of a bin its tokens are taken to lie evenly."""
    fair_HE1 = rows_HE.double().mean(-1)[:, None, None]
    counts = margins_HEQ.double()
    from_here = counts.flip(-1).cumsum(-1).flip(-1)  # tokens in this bin or above it
    bin_HE1 = ((from_here > fair_HE1).sum(-1, keepdim=True) - 1).clamp(min=0)
    inside, above = (x.gather(-1, bin_HE1) for x in (counts, from_here - counts))
    steps = torch.arange(-_STEPS, _STEPS + 1, dtype=torch.float64, device=counts.device)
    edges = FINEST * torch.sinh(steps / _PER_ASINH)  # Q − 1, symmetric around 0, one of them
    low, high = torch.cat([edges[:1], edges]), torch.cat([edges, edges[-1:]])
    share = (fair_HE1 - above) / inside.clamp(min=1)
    c_HE1 = torch.lerp(high[bin_HE1], low[bin_HE1], share)
    return torch.where(counts.sum(-1, keepdim=True) > fair_HE1, c_HE1, 0.0).squeeze(-1)


_STEPS = N_BINS // 2 - 1
"""Bins from 0 to LARGEST."""
_PER_ASINH = _STEPS / math.asinh(LARGEST / FINEST)


def _bin(margin: Tensor) -> Tensor:
    """Return the bin of each margin, edge < margin ≤ next edge; int64. What is no number is in the
    first."""
    steps = (margin / FINEST).asinh().mul_(_PER_ASINH).ceil_()
    steps = steps.nan_to_num(nan=-_STEPS)  # this and the next have no rule for `vmap` in place
    return steps.clamp(-_STEPS, _STEPS + 1).add_(_STEPS).long()


def new_bias(bias_HE: Tensor, stats: RouteStats, config: BalanceConfig) -> Tensor:
    """Return the selection bias after one optimiser step, given the step's counts; `[H, E]`.

    `sign`: b += u·sign(mean load − load), then centred (arXiv 2408.15664 §2; centring as Moonlight
    2502.16982 App. C).
    `quantile`: b −= c, then centred."""
    if config.bias == "sign":
        step = (
            torch.sign(stats.counts_HE.mean(-1, keepdim=True) - stats.counts_HE) * config.bias_rate
        )
    elif config.bias == "quantile":
        assert stats.margins_HEQ is not None
        step = -quantile_margin(stats.margins_HEQ, stats.counts_HE).to(bias_HE.dtype)
    else:
        return bias_HE
    return bias_HE + step - step.mean(-1, keepdim=True)


def add_stats(a: Sequence[RouteStats], b: Sequence[RouteStats]) -> list[RouteStats]:
    """Return sums of all statistics of each layer, without gradient; `mean_stats` makes them
    statistics of both parts."""
    names = [list(layer.tensors()) for layer in a]
    terms = ([x for layer in layers for x in layer.tensors().values()] for layers in (a, b))
    sums = iter(torch._foreach_add(*terms))
    return [_stats({name: next(sums) for name in layer}) for layer in names]


def mean_stats(sums: RouteStats, n: int) -> RouteStats:
    """Turn what `add_stats` summed over `n` equal parts of a batch into its statistics."""
    means = {name: x / n for name, x in sums.tensors().items() if name not in SUMMED}
    return sums._replace(**means)


def merge_stats(parts: Sequence[RouteStats]) -> RouteStats:
    """Return the statistics, and the report, of one layer over several equal parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.tensors() for part in parts]
    sums = {name: reduce(torch.add, (t[name] for t in tensors)) for name in tensors[0]}
    merged = mean_stats(_stats(sums), len(parts))
    reports = [part.report for part in parts if part.report is not None]
    if not reports:
        return merged
    columns = zip(*reports, strict=True)
    report = (None if column[0] is None else torch.cat(column) for column in columns)
    return merged._replace(report=RouteReport(*report))  # type: ignore[arg-type]
