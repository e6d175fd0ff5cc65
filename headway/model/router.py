"""The router: scores → selection → gates, one per head.

T tokens · H heads · L width that the router reads · E experts per head · K chosen. Scores and gates
are float32 (float64 in references), whatever the dtype of the tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headway.config import MoEConfig
from headway.kernels.activation import gate_heads
from headway.kernels.differentiate import transformed
from headway.kernels.packed import PackedWeight, pack, packed_linear
from headway.kernels.permute import drop_over_capacity
from headway.kernels.precision import widen
from headway.kernels.route import Routed, keeps_no_logits, logits, route, route_logits
from headway.kernels.topk import top_k_in_groups
from headway.model.balance import RouteStats, aux_loss, margin_counts
from headway.model.compute import Compute
from headway.model.costs import Cost, CostGroup, Term, Workload
from headway.model.packing import shape_only
from headway.model.roles import Group, Init, Role, SplitOver, StoresByRole


class Route(NamedTuple):
    """Which experts a sub-token visits, and how much each counts."""

    index_THK: Tensor
    """int64 (int32 on GPUs) `[T, H, K]`, best first; from E on: an expert that does nothing, or
    (E + Z) a slot dropped by the capacity."""
    gate_THK: Tensor
    """float32 `[T, H, K]`, with gradient."""
    stats: RouteStats
    chosen_THK: Tensor | None = None
    """The selection before any slot was dropped; None where nothing was asked for."""
    logits_THE: Tensor | None = None
    """float32 `[T, H, E]`, without gradient, where they were asked for."""


def replayed(index_THK: Tensor, router: "Router") -> Route:
    """Return a given selection as a route without gates, which a router of sub-tokens is sent."""
    T, H, K = index_THK.shape
    gate_THK = index_THK.new_zeros(T, H, K, dtype=torch.float32)
    zero_HE = router.bias_HE.new_zeros(H, router.n_choices)
    stats = RouteStats(zero_HE, zero_HE, zero_HE[:, 0], zero_HE[:, 0], zero_HE[0, 0])
    return Route(index_THK, gate_THK, stats)


def capacity(factor: float, seq_len: int, top_k: int, n_experts: int) -> int:
    """Return how many rows of S tokens an expert takes at most: ⌈factor · S · K / E⌉."""
    return -int(-factor * seq_len * top_k // n_experts)


class Router(StoresByRole):
    """One linear router per head.

    Args:
        d_model: D.
        config: heads, experts, gates, noise, jitter, capacity; of `balance` only what it counts
        matters here. `n_zero_experts` adds choices that do nothing: indices from E on.
        compute: `recompute` keeps nothing of size T × E for backward.
    Raises: UsageError where k, E and the gate do not fit."""

    bias_HE: Tensor

    def __init__(self, d_model: int, config: MoEConfig, compute: Compute = Compute()):
        super().__init__()
        self.n_experts, self.n_zero = config.n_experts, config.n_zero_experts
        self.n_choices, self.top_k = self.n_experts + self.n_zero, config.top_k
        self.config, self.balance = config.router, config.balance
        config.check_router()
        self.capacity_factor, self.recompute = config.capacity_factor, compute.recompute
        self.shard = SplitOver.NONE if config.reads_token else SplitOver.HEADS
        shape = (config.n_heads, self.n_choices, config.router_width(d_model))
        self.w_HEL = nn.Parameter(torch.empty(shape))
        self.w_noise_HEL = nn.Parameter(torch.empty(shape)) if self.config.noisy else None
        bias = torch.empty(shape[:2])
        self.logit_bias_HE = nn.Parameter(bias) if self.config.logit_bias else None
        self.wants_margins = self.balance.bias == "quantile"
        self.aux_by_sequence = self.balance.aux > 0 and self.balance.aux_scope == "sequence"
        # a buffer, saved with the model: added to the scores for selection only, moved by
        # `balance.new_bias`
        self.register_buffer("bias_HE", torch.zeros(shape[:2]))
        self.packed: PackedWeight | None = None

    def pack(self, dtype: torch.dtype) -> None:
        """Pack the weights in float32, whatever the dtype of the tokens."""
        if self.packed is not None:
            return
        reads_token = self.shard is SplitOver.NONE
        weight = self.w_HEL.flatten(0, 1) if reads_token else self.w_HEL
        bias_HE = None if self.logit_bias_HE is None else self.logit_bias_HE.detach()
        self.packed = pack(widen(weight.detach()), widen(weight).dtype, bias_HE)
        self.w_HEL = shape_only(self.w_HEL)

    def roles(self) -> dict[str, Role]:
        fan_in, shard = self.w_HEL.shape[-1], self.shard
        return {
            "w_HEL": Role(Group.ROUTER, fan_in=fan_in, shard=shard),
            "w_noise_HEL": Role(Group.ROUTER, Init.ZEROS, fan_in, shard=shard),
            "logit_bias_HE": Role(Group.VECTOR, Init.ZEROS, shard=shard),
            "bias_HE": Role(Group.ROUTER, Init.ZEROS, shard=shard),
        }

    @property
    def counts_sequences(self) -> bool:
        """Whether something here is counted by sequence, so that no sequence may be cut."""
        return self.aux_by_sequence or self.capacity_factor > 0

    def forward(
        self,
        x: Tensor,
        index_THK: Tensor | None = None,
        seq_len: int | None = None,
        dropless: bool = False,
        report: frozenset[str] = frozenset(),
    ) -> Route:
        """Route `[T, H, L]` sub-tokens, or `[T, D]` tokens that all heads read.

        Args:
            index_THK: replays a selection; gates and statistics are those of the given experts.
            seq_len: tokens of a sequence, which follow one another; divides T. None: they are one.
            dropless: ignore the capacity.
            report: as in `Context.report`; not empty returns `chosen_THK`, `logits` the logits.
        """
        fused = self._is_plain() and keeps_no_logits(x, self.w_HEL, self.bias_HE)
        arguments = (x, index_THK, seq_len, dropless, report)
        if self.recompute and torch.is_grad_enabled() and not fused and not transformed():
            return checkpoint(self._route, *arguments, use_reentrant=False)
        return self._route(*arguments)

    def logits(self, x: Tensor) -> Tensor:
        """Return raw scores before any gate function, `[T, H, E]` float32 (float64), with noise and
        jitter in training."""
        if self.training and self.config.jitter:
            x = x if x.dtype == torch.float64 else x.float()
            x = x * torch.empty_like(x).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
        if self.packed is not None:
            return packed_linear(x, self.packed, wide=True).view(len(x), *self.w_HEL.shape[:2])
        logits_THE = logits(x, self.w_HEL)
        if self.logit_bias_HE is not None:
            logits_THE = logits_THE + self.logit_bias_HE
        if self.training and self.w_noise_HEL is not None:
            std_THE = F.softplus(logits(x, self.w_noise_HEL))
            logits_THE = logits_THE + torch.randn_like(logits_THE) * std_THE
        return logits_THE

    def _is_plain(self) -> bool:
        """Whether nobody needs the logits themselves, and the weights are not packed."""
        c = self.config
        changed = c.jitter or self.w_noise_HEL is not None
        wanted = self.wants_margins or self.aux_by_sequence or c.logit_bias or c.n_groups > 1
        return not (wanted or self.packed is not None or (self.training and changed))

    def _select_in_groups(self, logits_THE: Tensor) -> Tensor:
        """Return the selection `[T, H, K]` from the best groups of experts alone."""
        c, score_THE = self.config, logits_THE.detach()
        if c.gate == "sigmoid":
            score_THE = gate_heads(torch.ones_like(score_THE).unsqueeze(-1), score_THE).squeeze(-1)
        biased_THE = score_THE + self.bias_HE
        return top_k_in_groups(biased_THE, self.top_k, c.n_groups, c.top_k_groups, c.group_best)

    def _route(
        self,
        x: Tensor,
        index_THK: Tensor | None,
        seq_len: int | None,
        dropless: bool,
        report: frozenset[str],
    ) -> Route:
        c, bias_HE = self.config, self.bias_HE
        options = (self.top_k, c.gate, c.renormalize, c.scale)
        aux_H = margins_HEQ = logits_THE = None
        if self._is_plain() and "logits" not in report:
            routed = route(x, self.w_HEL, bias_HE, index_THK, *options)
        else:
            logits_THE = self.logits(x)
            if index_THK is None and c.n_groups > 1:
                index_THK = self._select_in_groups(logits_THE)
            if self.aux_by_sequence:
                routed, aux_H = self._by_sequence(logits_THE, index_THK, seq_len)
            else:
                routed = route_logits(logits_THE, bias_HE, index_THK, *options)
            if self.wants_margins:
                raw_THE = logits_THE.detach()
                score_THE = torch.sigmoid(raw_THE) if c.gate == "sigmoid" else raw_THE
                margins_HEQ = margin_counts(score_THE, bias_HE, self.top_k)
        index_THK, dropped = routed.index_THK, routed.gate_THK.new_zeros(())
        if self.capacity_factor and not dropless:
            index_THK = self._drop(index_THK, seq_len)
            dropped = (index_THK == self.n_choices).to(dropped.dtype).mean()
        stats = RouteStats(
            counts_HE=routed.counts_HE,
            prob_HE=routed.prob_HE,
            z_H=routed.z_H,
            entropy_H=routed.entropy_H,
            dropped=dropped,
            aux_H=aux_H,
            margins_HEQ=margins_HEQ,
        )
        if not report:
            return Route(index_THK, routed.gate_THK, stats)
        seen = logits_THE.detach() if "logits" in report and logits_THE is not None else None
        return Route(index_THK, routed.gate_THK, stats, routed.index_THK, seen)

    def _by_sequence(
        self, logits_THE: Tensor, index_THK: Tensor | None, seq_len: int | None
    ) -> tuple[Routed, Tensor]:
        """Routes every sequence as if it were a head of its own; with the auxiliary loss of each
        head, mean over sequences `[H]`."""
        c, n = self.config, _sequences(logits_THE.shape[0], seq_len)
        routed = route_logits(
            _apart(logits_THE, n),
            self.bias_HE.repeat_interleave(n, 0),
            None if index_THK is None else _apart(index_THK, n),
            self.top_k,
            c.gate,
            c.renormalize,
            c.scale,
        )
        aux_HB = aux_loss(routed.counts_HE, routed.prob_HE).view(-1, n)
        whole = Routed(
            index_THK=_together(routed.index_THK, n),
            gate_THK=_together(routed.gate_THK, n),
            prob_HE=routed.prob_HE.unflatten(0, (-1, n)).mean(1),
            z_H=routed.z_H.view(-1, n).mean(1),
            entropy_H=routed.entropy_H.view(-1, n).mean(1),
            counts_HE=routed.counts_HE.unflatten(0, (-1, n)).sum(1),
        )
        return whole, aux_HB.mean(1)

    def _drop(self, index_THK: Tensor, seq_len: int | None) -> Tensor:
        """Put E + Z in place of every slot over the capacity of its expert in its sequence."""
        T = index_THK.shape[0]
        n = _sequences(T, seq_len)
        by_sequence = _apart(index_THK, n)
        limit = capacity(self.capacity_factor, T // n, self.top_k, self.n_choices)
        dropped = drop_over_capacity(by_sequence, self.n_choices, limit)
        if self.n_zero:  # what does nothing has no capacity
            dropped = torch.where(by_sequence < self.n_experts, dropped, by_sequence)
        return _together(dropped, n)

    def costs(self, work: Workload) -> Sequence[Cost]:
        """Saved are the scores, the K chosen with their gates and, where matmuls are not in
        float32, a float32 copy of the input; with `recompute` the choices alone."""
        H, E, L = self.w_HEL.shape
        T, rows = work.n_tokens, work.n_tokens * H * self.top_k
        saved = 4 * T * H * E + 12 * rows
        weights, formula = H * E * L, "H·E·D_R"
        if self.w_noise_HEL is not None:
            weights, formula = 2 * weights, "2·H·E·D_R"
            saved += 8 * T * H * E
        if work.bytes_per_value != 4:
            saved += 4 * T * (L if self.shard is SplitOver.NONE else H * L)
        saved_term = Term(saved, "(4·T·H·E + 12·R)")
        if self.recompute:
            saved_term = Term(4 * rows, "4·R")
        flops = Term(2 * weights, f"2·{formula}")
        if self.logit_bias_HE is not None:
            weights, formula = weights + H * E, f"({formula} + H·E)"
        return (Cost(CostGroup.ROUTERS, Term(weights, formula), flops, saved_term),)


def _sequences(T: int, seq_len: int | None) -> int:
    """Return how many sequences T tokens are; no tokens are one empty sequence."""
    return T // seq_len if seq_len and T else 1


def _apart(x_THX: Tensor, n: int) -> Tensor:
    """Map `[n·S, H, X]` to `[S, H·n, X]`: each of n sequences as a head of its own, those of one
    head together."""
    T, H, X = x_THX.shape
    return x_THX.view(n, T // n, H, X).permute(1, 2, 0, 3).reshape(T // n, H * n, X)


def _together(x_SNX: Tensor, n: int) -> Tensor:
    """Invert `_apart`."""
    S, N, X = x_SNX.shape
    return x_SNX.view(S, N // n, n, X).permute(2, 0, 1, 3).reshape(S * n, N // n, X)
