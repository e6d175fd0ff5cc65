"""The sparse layers with keyword arguments, drop-in `nn.Module`s.

| layer | heads | expert width | router reads |
|---|---|---|---|
| `MoE` | 1 | D | the token |
| `LatentMoE` (arXiv 2601.18089) | 1 | ℓ < D | the token |
| `MultiHeadLatentMoE` (arXiv 2602.04870) | H | L, H·L = D_L | its sub-token, or the token |

`layer(x)` returns y of x's shape and dtype, and `RouteStats`. Inside a model the same layers are
built from a `MoEConfig` (`model.build`)."""

from headway.config import Activation, BalanceConfig, MoEConfig, Precision, Projection, RouterConfig
from headway.model.compute import Compute
from headway.model.init import init_weights
from headway.model.moe import SparseLayer


class MoE(SparseLayer):
    """Flat mixture of experts at full width D.

    Args:
        d_model, n_experts, top_k, d_expert: D, E, K, F.
        n_zero_experts: further choices that do nothing.
        activation: of experts and shared expert.
        expert_bias: biases of the experts, on pre-activations and outputs.
        d_shared: hidden width of a shared expert at full width D; 0 means none.
        shared_gate: whether a sigmoid of the token multiplies its output.
        router, balance: how scores become gates; which bias rule selects.
        capacity_factor: 0 is dropless; else an expert takes at most ⌈factor·S·K/E⌉ rows of each
            sequence of S tokens, the first ones.
        recompute: constant-memory form.
        precision: of the experts' products in the forward pass; see `MoEConfig.precision`.
    Raises: UsageError where the sizes do not fit."""

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        d_expert: int,
        *,
        n_zero_experts: int = 0,
        activation: Activation = "swiglu",
        expert_bias: bool = False,
        d_shared: int = 0,
        shared_gate: bool = False,
        router: RouterConfig = RouterConfig(),
        balance: BalanceConfig = BalanceConfig(),
        capacity_factor: float = 0.0,
        recompute: bool = False,
        precision: Precision = "bfloat16",
    ):
        config = MoEConfig(
            kind="moe",
            n_experts=n_experts,
            top_k=top_k,
            d_expert=d_expert,
            n_zero_experts=n_zero_experts,
            activation=activation,
            expert_bias=expert_bias,
            d_shared=d_shared,
            shared_gate=shared_gate,
            router=router,
            balance=balance,
            capacity_factor=capacity_factor,
            precision=precision,
        )
        super().__init__(d_model, config, Compute(recompute=recompute))
        init_weights(self)


class MultiHeadLatentMoE(SparseLayer):
    """Project, split into H sub-tokens, run H independent small mixtures, concatenate, project
    back.

        [x_1 … x_H] = split(W_in x);  o = W_out · concat_h Σ_{e ∈ top-k(h)} g_e · expert_{h,e}(x_h)

    (arXiv 2602.04870 §3.) Args as in `MoE`, and:
        n_heads: H; divides d_latent.
        d_latent: D_L = H·L; 0 means d_model.
        projection: `none` has no W_in and W_out; sub-tokens are slices of x.
        latent_norm: learnable RMSNorm per head after W_in; norm_eps is added to its mean square."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_experts: int,
        top_k: int,
        d_expert: int,
        *,
        d_latent: int = 0,
        projection: Projection = "learned",
        latent_norm: bool = True,
        norm_eps: float = 1e-6,
        n_zero_experts: int = 0,
        activation: Activation = "swiglu",
        expert_bias: bool = False,
        d_shared: int = 0,
        shared_gate: bool = False,
        router: RouterConfig = RouterConfig(),
        balance: BalanceConfig = BalanceConfig(),
        capacity_factor: float = 0.0,
        recompute: bool = False,
        precision: Precision = "bfloat16",
    ):
        config = MoEConfig(
            kind="multi_head_latent",
            n_heads=n_heads,
            n_experts=n_experts,
            top_k=top_k,
            d_expert=d_expert,
            d_latent=d_latent,
            projection=projection,
            latent_norm=latent_norm,
            n_zero_experts=n_zero_experts,
            activation=activation,
            expert_bias=expert_bias,
            d_shared=d_shared,
            shared_gate=shared_gate,
            router=router,
            balance=balance,
            capacity_factor=capacity_factor,
            precision=precision,
        )
        super().__init__(d_model, config, Compute(recompute=recompute), norm_eps=norm_eps)
        init_weights(self)


class LatentMoE(SparseLayer):
    """LatentMoE (arXiv 2601.18089): one head of width ℓ = d_latent; router and shared expert stay
    at full width D. Args as in `MultiHeadLatentMoE`.

    The paper's sizes for a baseline of N experts, top-K and α = D/ℓ come from `latent_eff` and
    `latent_acc`."""

    def __init__(
        self,
        d_model: int,
        d_latent: int,
        n_experts: int,
        top_k: int,
        d_expert: int,
        *,
        latent_norm: bool = True,
        norm_eps: float = 1e-6,
        n_zero_experts: int = 0,
        activation: Activation = "swiglu",
        expert_bias: bool = False,
        d_shared: int = 0,
        shared_gate: bool = False,
        router: RouterConfig = RouterConfig(),
        balance: BalanceConfig = BalanceConfig(),
        capacity_factor: float = 0.0,
        recompute: bool = False,
        precision: Precision = "bfloat16",
    ):
        config = MoEConfig(
            kind="latent",
            n_experts=n_experts,
            top_k=top_k,
            d_expert=d_expert,
            d_latent=d_latent,
            latent_norm=latent_norm,
            n_zero_experts=n_zero_experts,
            activation=activation,
            expert_bias=expert_bias,
            d_shared=d_shared,
            shared_gate=shared_gate,
            router=router,
            balance=balance,
            capacity_factor=capacity_factor,
            precision=precision,
        )
        super().__init__(d_model, config, Compute(recompute=recompute), norm_eps=norm_eps)
        init_weights(self)
