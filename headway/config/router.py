"""Options of a router: scores, selection, gates."""

import math
from dataclasses import dataclass
from typing import Literal

from headway.config.bounds import at_least, nearest_divisors
from headway.config.errors import UsageError

RouterGate = Literal["softmax_topk", "topk_softmax", "sigmoid"]


@dataclass(frozen=True)
class RouterConfig:
    """scores → selection → gates. One router per head; scores, gates and reductions are float32."""

    gate: RouterGate = "topk_softmax"
    """How a gate comes from a score. `topk_softmax`: softmax over the k selected scores (needs
    top-k ≥ 2, else the gate is the constant 1). `softmax_topk`: softmax over all experts, then
    select. `sigmoid`: of each score by itself."""
    renormalize: bool = False
    """Divide the k gates by their sum (for `softmax_topk` and `sigmoid`; `topk_softmax` sums to 1
    already)."""
    scale: float = 1.0
    """Multiplies every gate; > 0. Nemotron-3 uses 5.0 with `sigmoid` and renormalised gates."""
    logit_bias: bool = False
    """A learned bias per expert on the scores, part of selection and gates alike (GPT-OSS)."""
    n_groups: int = 1
    """Equal groups of experts, of which the best ones alone are chosen from (DeepSeek-V2, arXiv
    2405.04434 §2.2.2); 1 is off."""
    top_k_groups: int = 1
    """Groups that are chosen from; 1 ≤ top_k_groups ≤ n_groups."""
    group_best: int = 1
    """A group is as good as the sum of its so many best biased scores: 1 in DeepSeek-V2, 2 in
    DeepSeek-V3 and GLM-4.5."""
    reads: Literal["auto", "sub_token", "token"] = "auto"
    """What the router of a latent layer reads: its own sub-token of width L or the whole token of
    width D. `auto` is what was published: the sub-token for Multi-Head LatentMoE, the token for
    LatentMoE. Flat MoE always reads the token."""
    noisy: bool = False
    """Noisy top-k (Shazeer et al. 2017, eq. 4): adds N(0,1)·softplus(x·W_noise) to the scores in
    training."""
    jitter: float = 0.0
    """Multiplies the router's input by U(1−jitter, 1+jitter) in training (Switch Transformer,
    §2.2); 0 ≤ jitter < 1."""

    def check(self, n_experts: int, top_k: int) -> None:
        """Raise UsageError where k, E and the gate do not fit."""
        if not 1 <= top_k <= n_experts:
            raise UsageError(
                f"top_k={top_k} must lie between 1 and n_experts={n_experts}; "
                "lower top_k or add experts"
            )
        if top_k == 1 and self.gate == "topk_softmax":
            raise UsageError(
                "top_k=1 with gate='topk_softmax' makes every gate 1, so the router gets no "
                "gradient; use gate='softmax_topk' or 'sigmoid'"
            )
        if top_k == 1 and self.renormalize:
            raise UsageError(
                "top_k=1 with renormalize=True makes every gate 1; set renormalize=False"
            )
        self._check_groups(n_experts, top_k)
        if not 0 < self.scale < math.inf or not 0 <= self.jitter < 1:  # also false for NaN
            raise UsageError(
                f"router needs a finite scale > 0 and 0 <= jitter < 1; "
                f"got scale={self.scale}, jitter={self.jitter}"
            )

    def _check_groups(self, n_experts: int, top_k: int) -> None:
        at_least(1, "model.moe.router", vars(self), "n_groups top_k_groups group_best")
        if self.n_groups == 1 and self.group_best > 1:
            raise UsageError(
                f"model.moe.router.group_best={self.group_best} has no effect with n_groups=1; "
                "use group_best=1, or several groups"
            )
        if n_experts % self.n_groups:
            raise UsageError(
                f"model.moe.router.n_groups={self.n_groups} must divide the {n_experts} choices "
                f"of a router; use n_groups={nearest_divisors(n_experts, self.n_groups)}"
            )
        size = n_experts // self.n_groups
        for name, value, most in (
            ("top_k_groups", self.top_k_groups, self.n_groups),
            ("group_best", self.group_best, size),
        ):
            if value > most:
                raise UsageError(
                    f"model.moe.router.{name}={value} exceeds {most}: {self.n_groups} groups of "
                    f"{size}; use {most} or fewer"
                )
        if top_k > self.top_k_groups * size:
            raise UsageError(
                f"top_k={top_k} exceeds the {self.top_k_groups * size} experts of "
                f"top_k_groups={self.top_k_groups} groups; raise top_k_groups"
            )
