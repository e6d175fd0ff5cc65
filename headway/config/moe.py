"""Options of the sparse layer: experts, balance; its router's are in router.py."""

import math
from dataclasses import dataclass, field
from typing import Literal

from headway.config.bounds import above_zero, at_least, nearest_divisors
from headway.config.errors import UsageError
from headway.config.router import RouterConfig

Activation = Literal["swiglu", "relu2", "gelu", "swiglu_clamped"]
Precision = Literal["bfloat16", "float8"]
Projection = Literal["learned", "none"]


def n_inputs(activation: str) -> int:
    """Return G, the pre-activations per hidden unit: SwiGLU multiplies two, gate and up."""
    return 2 if activation.startswith("swiglu") else 1


@dataclass(frozen=True)
class BalanceConfig:
    """Keeps the load of the experts even; shown as load / fair share: 1.0 fair, 0.0 dead."""

    aux: float = 0.01
    """Coefficient of the auxiliary loss E·Σ f_e·P_e, averaged over layers and heads (1.0 when
    balanced); ≥ 0."""
    aux_scope: Literal["sequence", "global_batch"] = "global_batch"
    """Whose load f_e the auxiliary loss reads. `global_batch`: that of a whole optimiser step
    (arXiv 2501.11873), which lets experts specialise by sequence. It is the step before, so that
    all micro-batches and ranks read the same; the first step reads an even load. `sequence`: each
    sequence's own, with its own P_e (DeepSeek-V3, arXiv 2412.19437 §2.1.2); keeps the scores of all
    experts in memory, on GPUs too."""
    z: float = 0.0
    """Coefficient of the router z-loss, mean (logsumexp of the scores)² (ST-MoE, eq. 5); ≥ 0,
    typically 1e-3."""
    bias: Literal["none", "sign", "quantile"] = "none"
    """A bias on the selection, never on the gates, updated once per optimiser step. `sign`:
    auxiliary-loss-free (arXiv 2408.15664). `quantile`: quantile balancing (arXiv 2607.24653); both
    want `aux` = 0. The quantile is that of all tokens of the step, from 512 counts per expert
    that ranks add up (4 KiB per expert and step)."""
    bias_rate: float = 1e-3
    """Step of the `sign` rule; > 0."""

    def check(self) -> None:
        """Raise UsageError for a value out of range."""
        at_least(0, "model.moe.balance", vars(self), "aux z")
        above_zero("model.moe.balance", vars(self), "bias_rate")
        if self.aux_scope not in ("sequence", "global_batch"):
            raise UsageError(
                f"model.moe.balance.aux_scope={self.aux_scope} is not known (the load of a "
                "micro-batch depends on how a step is divided); use sequence or global_batch"
            )


@dataclass(frozen=True)
class MoEConfig:
    """The sparse feed-forward layer. `kind = dense` uses the block's dense feed-forward network
    instead."""

    kind: Literal["dense", "moe", "latent", "multi_head_latent"] = "multi_head_latent"
    """`moe`: flat mixture, experts of width D. `latent`: LatentMoE (arXiv 2601.18089), experts of
    width d_latent, the token goes down once and up once. `multi_head_latent`: Multi-Head LatentMoE
    (arXiv 2602.04870), H independent small mixtures, each on its own sub-token of width L =
    d_latent / n_heads."""
    n_experts: int = 32
    """E, experts per head; ≥ top_k."""
    top_k: int = 4
    """K, experts chosen per token and head; 1 ≤ K ≤ E, any integer."""
    n_zero_experts: int = 0
    """Z, further choices of each router that do nothing and cost nothing, so that easy tokens get
    fewer experts; counted and balanced like the others. `describe` and `plan` still count K. 0 is
    off."""
    d_expert: int = 192
    """F, hidden width of one expert."""
    n_heads: int = 1
    """H, heads of the layer; only `multi_head_latent` takes more than 1; divides d_latent."""
    d_latent: int = 0
    """D_L, total latent width (ℓ for `latent`, H·L for `multi_head_latent`); 0 means d_model."""
    projection: Projection = "learned"
    """How latent layers split and merge a token. `learned`: by W_in and W_out. `none`: sub-tokens
    are the H slices of the token, D_L = D; their FLOPs are free for the experts."""
    activation: Activation = "swiglu"
    """Activation of the experts and of the shared expert. `swiglu_clamped` is GPT-OSS's."""
    expert_bias: bool = False
    """Biases of the experts, on pre-activations and outputs (GPT-OSS)."""
    precision: Precision = "bfloat16"
    """Precision of the experts' products in the forward pass. `float8`: e4m3 with float32 scales,
    on GPUs of compute capability 9.0 and later, experts up to 256 wide; off by 5e-2 (SwiGLU 6.5e-2)
    from float64, where bfloat16 is by 2.4e-3; backward stays in bfloat16. `bfloat16`: `run.dtype`.
    """
    d_shared: int = 0
    """Hidden width of the shared expert, which every token passes at full width D; 0 means none.
    Several shared experts are one as wide as all of them."""
    shared_gate: bool = False
    """Multiplies the shared expert's output by a sigmoid of the token (Qwen2-MoE)."""
    latent_norm: bool = True
    """Learnable RMSNorm per head on the sub-tokens (`moe` has no sub-tokens, hence none).
    On, unlike the published layer, since it was better in each comparison made
    (docs/negative-results.md)."""
    capacity_factor: float = 0.0
    """0 is dropless. Otherwise an expert takes at most ⌈factor·S·K/E⌉ tokens of each sequence of S;
    later ones are dropped, in training and validation. Samples drop none."""
    n_dense_layers: int = 0
    """The first n layers keep a dense feed-forward network."""
    sparse_step: int = 1
    """Of every n layers the last one is sparse (Qwen's `decoder_sparse_step`); ≥ 1."""
    dense_layers: tuple[int, ...] = ()
    """Further layers that keep a dense feed-forward network, from 0 (Qwen's `mlp_only_layers`)."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """Scores, selection, gates."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Auxiliary losses and bias rules."""

    @property
    def is_latent(self) -> bool:
        """Return whether sub-tokens are routed, not tokens."""
        return self.kind in ("latent", "multi_head_latent")

    @property
    def projects(self) -> bool:
        """Return whether the layer has W_in and W_out."""
        return self.is_latent and self.projection == "learned"

    @property
    def reads_token(self) -> bool:
        """Return whether routers read whole tokens and so can run before sub-tokens are sent. In a
        flat MoE, where the sub-token is the token, this makes no difference."""
        reads = self.router.reads
        return reads == "token" or (reads == "auto" and self.kind == "latent")

    @property
    def n_inputs(self) -> int:
        """Return G, the pre-activations per hidden unit of an expert."""
        return n_inputs(self.activation)

    def latent_width(self, d_model: int) -> int:
        """Return D_L = H·L, the total width of the sub-tokens of a token; D for a flat MoE."""
        return (self.d_latent or d_model) if self.is_latent else d_model

    def head_width(self, d_model: int) -> int:
        """Return L, the width of a sub-token and of its experts; D for a flat MoE."""
        return self.latent_width(d_model) // self.n_heads

    def router_width(self, d_model: int) -> int:
        """Return the width of what a router reads, D or L."""
        return d_model if self.reads_token else self.head_width(d_model)

    @property
    def counts_by_sequence(self) -> str:
        """Name the option for which a pass of a sparse layer needs whole sequences; "" for none."""
        if self.kind == "dense":
            return ""
        if self.capacity_factor:
            return f"model.moe.capacity_factor={self.capacity_factor}"
        if self.balance.aux and self.balance.aux_scope == "sequence":
            return "model.moe.balance.aux_scope=sequence"
        return ""

    def check_router(self) -> None:
        """Raise UsageError where k, the experts, gates, groups and the bias rule do not fit."""
        self.router.check(self.n_experts + self.n_zero_experts, self.top_k)
        if self.router.n_groups > 1 and self.balance.bias == "quantile":
            raise UsageError(
                "model.moe.balance.bias=quantile knows no groups, and "
                f"router.n_groups={self.router.n_groups}; use bias=sign, or n_groups=1"
            )

    def check(self, d_model: int, n_layers: int) -> dict[str, str]:
        """Return derived value → the sentence that says where it comes from. Raise UsageError where
        the sizes do not fit a model of `n_layers` blocks of width `d_model`."""
        at_least(1, "model.moe", vars(self), "n_experts d_expert n_heads sparse_step")
        at_least(0, "model.moe", vars(self), "d_latent d_shared capacity_factor")
        at_least(0, "model.moe", vars(self), "n_dense_layers n_zero_experts")
        self.balance.check()
        self.check_router()
        if self.n_dense_layers > n_layers:
            raise UsageError(
                f"model.moe.n_dense_layers={self.n_dense_layers} exceeds "
                f"model.n_layers={n_layers}; use {n_layers} or fewer, or kind=dense"
            )
        if self.precision == "float8" and (self.expert_bias or self.activation[-7:] == "clamped"):
            raise UsageError(
                f"model.moe.precision=float8 takes neither expert_bias={self.expert_bias} nor "
                f"activation={self.activation}; use bfloat16"
            )
        for layer in self.dense_layers:
            if not 0 <= layer < n_layers:
                raise UsageError(
                    f"model.moe.dense_layers names layer {layer} and model.n_layers={n_layers}; "
                    f"use layers from 0 to {n_layers - 1}"
                )
        if self.shared_gate and not self.d_shared:
            raise UsageError(
                "model.moe.shared_gate=True has no effect with d_shared=0; use d_shared > 0, or "
                "shared_gate=False"
            )
        if self.n_heads > 1 and self.kind != "multi_head_latent":
            raise UsageError(
                f"model.moe.n_heads={self.n_heads} needs kind=multi_head_latent, and "
                f"kind={self.kind}; use n_heads=1 or that kind"
            )
        if self.kind == "moe":
            if self.d_latent:
                raise UsageError(
                    f"model.moe.d_latent={self.d_latent} has no effect with kind=moe; "
                    "use d_latent=0, or kind=latent"
                )
            if self.projection != "learned":
                raise UsageError(
                    f"model.moe.projection={self.projection} has no effect with kind=moe; "
                    "use projection=learned, or kind=multi_head_latent"
                )
            return {}
        if not self.projects and self.d_latent not in (0, d_model):
            raise UsageError(
                f"model.moe.d_latent={self.d_latent} needs projection=learned: slices of a token "
                f"are as wide as d_model={d_model}; use d_latent=0, or that projection"
            )
        d_latent = self.latent_width(d_model)
        if d_latent % self.n_heads:
            raise UsageError(
                f"model.moe.n_heads={self.n_heads} must divide the latent width {d_latent}; "
                f"use n_heads={nearest_divisors(d_latent, self.n_heads)}"
            )
        derived = {}
        if not self.d_latent:
            derived["model.moe.d_latent"] = f"{d_latent}: as wide as d_model"
        if self.router.reads == "auto":
            what = "token" if self.reads_token else "sub_token"
            name = "LatentMoE" if self.kind == "latent" else "Multi-Head LatentMoE"
            derived["model.moe.router.reads"] = f"{what}: as published for {name}"
        if self.n_heads > 1:
            derived["width of a latent head"] = (
                f"{self.head_width(d_model)}: d_latent {d_latent} / n_heads {self.n_heads}"
            )
        return derived


def latent_eff(n_experts: int, top_k: int, alpha: int) -> tuple[int, int]:
    """Return (N', K') of LatentMoE-eff: N' = αN, K' = K. The same experts' work at 1/α of the cost
    (arXiv 2601.18089 eq. 1)."""
    return alpha * n_experts, top_k


def latent_acc(
    n_experts: int, top_k: int, alpha: int, d_expert: int, d_model: int, activation: Activation
) -> tuple[int, int]:
    """Return (N', K') of LatentMoE-acc: N' = αN, K' = αK − the experts that pay for the two
    projections (eq. 2).

    The projections cost 2·D·ℓ multiplications per token and one expert (G+1)·ℓ·F, so ⌈2·D /
    ((G+1)·F)⌉ experts pay. The published models fit K' = αK − 2, which this gives for their sizes
    (D 4096, F 2688, two matrices)."""
    paying = math.ceil(2 * d_model / ((n_inputs(activation) + 1) * d_expert))
    if alpha * top_k <= paying:
        raise UsageError(
            f"the projections cost as much as {paying} of the {alpha * top_k} latent experts; "
            f"raise top_k={top_k}, alpha={alpha} or d_expert={d_expert}"
        )
    return alpha * n_experts, alpha * top_k - paying
