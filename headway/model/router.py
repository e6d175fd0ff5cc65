"""The router: scores → selection → gates, one per head.

T tokens · H heads · L width that the router reads · E experts per head · K chosen. Scores and gates
are float32 (float64 in references), whatever the dtype of the tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headway.config import BalanceConfig, RouterConfig, UsageError
from headway.kernels.differentiate import transformed
from headway.kernels.route import keeps_no_logits, logits, route, route_logits
from headway.kernels.rows import drop_over_capacity
from headway.model.balance import RouteStats, quantile_margin


class Route(NamedTuple):
    """Which experts a sub-token visits, and how much each counts."""

    index_THK: Tensor
    """int64 (int32 on GPUs) `[T, H, K]`, best first; E marks a slot dropped by the capacity."""
    gate_THK: Tensor
    """float32 `[T, H, K]`, with gradient."""
    stats: RouteStats


class Router(nn.Module):
    """One linear router per head.

    Args:
        n_heads, d_in, n_experts, top_k: H, L, E, K. With `shared_input` every head reads the same
        `[T, d_in]` token.
        config: gates, noise, jitter. balance: only its bias rule matters here.
        capacity_factor: 0 is dropless.
        recompute: keep nothing of size T×E for backward.
    Raises: UsageError where k, E and the gate do not fit.
    """

    bias_HE: Tensor

    def __init__(
        self,
        n_heads: int,
        d_in: int,
        n_experts: int,
        top_k: int,
        config: RouterConfig,
        balance: BalanceConfig,
        capacity_factor: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        check_router(n_experts, top_k, config)
        self.n_experts, self.top_k, self.config = n_experts, top_k, config
        self.capacity_factor, self.recompute = capacity_factor, recompute
        self.w_HEL = nn.Parameter(torch.empty(n_heads, n_experts, d_in))
        self.w_noise_HEL = (
            nn.Parameter(torch.empty(n_heads, n_experts, d_in)) if config.noisy else None
        )
        self.wants_quantile = balance.bias == "quantile"
        # a buffer, saved with the model: added to the scores for selection only, moved by
        # `balance.new_bias`
        self.register_buffer("bias_HE", torch.zeros(n_heads, n_experts))

    def forward(self, x: Tensor, index_THK: Tensor | None = None) -> Route:
        """Route `[T, H, L]` sub-tokens, or `[T, D]` tokens that all heads read.

        `index_THK` replays a selection: gates and statistics are then those of the given experts.
        """
        lean = self._is_plain() and keeps_no_logits(x, self.w_HEL, self.bias_HE)
        if self.recompute and torch.is_grad_enabled() and not lean and not transformed():
            return checkpoint(self._route, x, index_THK, use_reentrant=False)
        return self._route(x, index_THK)

    def _apply(self, fn, recurse=True):
        """As in `nn.Module`, and the bias stays float32 where the layer becomes bfloat16 or
        float16: steps of `bias_rate` would be lost in rounding."""
        bias_HE = self.bias_HE
        super()._apply(fn, recurse)
        if self.bias_HE.dtype in (torch.bfloat16, torch.float16):
            self.bias_HE = bias_HE.to(self.bias_HE.device, torch.float32)
        return self

    def logits(self, x: Tensor) -> Tensor:
        """Raw scores before any gate function, `[T, H, E]` float32 (float64), with noise and jitter
        in training.
        """
        if self.training and self.config.jitter:
            x = x if x.dtype == torch.float64 else x.float()
            x = x * torch.empty_like(x).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
        logits_THE = logits(x, self.w_HEL)
        if self.training and self.w_noise_HEL is not None:
            std_THE = F.softplus(logits(x, self.w_noise_HEL))
            logits_THE = logits_THE + torch.randn_like(logits_THE) * std_THE
        return logits_THE

    def _is_plain(self) -> bool:
        """Whether nobody needs the logits themselves."""
        changed = self.config.jitter or self.w_noise_HEL is not None
        return not self.wants_quantile and not (self.training and changed)

    def _route(self, x: Tensor, index_THK: Tensor | None) -> Route:
        c, bias_HE = self.config, self.bias_HE
        options = (index_THK, self.top_k, c.gate, c.renormalize, c.scale)
        if self._is_plain():
            logits_THE, routed = None, route(x, self.w_HEL, bias_HE, *options)
        else:
            logits_THE = self.logits(x)
            routed = route_logits(logits_THE, bias_HE, *options)
        kept_THK, dropped = routed.index_THK, routed.gate_THK.new_zeros(())
        if self.capacity_factor:
            kept_THK = drop_over_capacity(kept_THK, self.n_experts, self.capacity(x.shape[0]))
            dropped = (kept_THK == self.n_experts).to(dropped.dtype).mean()
        quantile_HE = None
        if self.wants_quantile:
            assert logits_THE is not None
            raw_THE = logits_THE.detach()
            score_THE = torch.sigmoid(raw_THE) if c.gate == "sigmoid" else raw_THE
            quantile_HE = quantile_margin(score_THE, bias_HE, self.top_k)
        stats = RouteStats(
            counts_HE=routed.counts_HE,
            prob_HE=routed.prob_HE,
            z_H=routed.z_H,
            entropy_H=routed.entropy_H,
            dropped=dropped,
            quantile_HE=quantile_HE,
        )
        return Route(kept_THK, routed.gate_THK, stats)

    def capacity(self, n_tokens: int) -> int:
        """Most rows an expert takes: ⌈factor · T · K / E⌉."""
        return -int(-self.capacity_factor * n_tokens * self.top_k // self.n_experts)


def check_router(n_experts: int, top_k: int, config: RouterConfig) -> None:
    """Raise UsageError where k, E and the gate do not fit."""
    if not 1 <= top_k <= n_experts:
        raise UsageError(
            f"top_k={top_k} must lie between 1 and n_experts={n_experts}; "
            "lower top_k or add experts"
        )
    if top_k == 1 and config.gate == "topk_softmax":
        raise UsageError(
            "top_k=1 with gate='topk_softmax' makes every gate 1, so the router gets no gradient; "
            "use gate='softmax_topk' or 'sigmoid'"
        )
    if top_k == 1 and config.renormalize:
        raise UsageError("top_k=1 with renormalize=True makes every gate 1; set renormalize=False")
    if not 0 < config.scale < math.inf or not 0 <= config.jitter < 1:  # also false for NaN
        raise UsageError(
            f"router needs a finite scale > 0 and 0 <= jitter < 1; "
            f"got scale={config.scale}, jitter={config.jitter}"
        )
