"""The models that the quality benches compare: as many active parameters, hence FLOPs, per token.

D model width · L head width · H heads · E experts per head · K chosen · F expert hidden width.
"""

from dataclasses import replace
from typing import Literal

from headway.config import Activation, BalanceConfig, Config, ModelConfig, MoEConfig, RouterConfig
from headway.plan.cost import model_costs
from headway.plan.cost import total as sum_of

Kind = Literal["dense", "moe", "latent", "multi_head_latent"]


def parameters(model: ModelConfig) -> tuple[int, int]:
    """(total, active per token) parameters without the embedding, which multiplies nothing."""
    table = 0 if model.tied else model.vocab_size * model.d_model
    costs = model_costs(Config(model=model), 1)
    return int(sum_of(costs.parameters)) - table, int(sum_of(costs.active)) - table


def equal_shape(
    kind: Kind,
    *,
    vocab_size: int,
    d_model: int = 128,
    n_layers: int = 4,
    n_heads: int = 4,
    head_width: int = 128,
    d_latent: int = 0,
    top_k: int = 4,
    multiple: int = 2,
    d_shared: int = 0,
    latent_norm: bool = True,
    activation: Activation = "swiglu",
    router: RouterConfig = RouterConfig(),
    balance: BalanceConfig = BalanceConfig(),
) -> ModelConfig:
    """A model as large as the others, as nearly as whole sizes allow.

    Active per token: as the dense network with a SwiGLU of width 4·D. In all: as if its
    feed-forward layers were four times as large, which is a flat MoE of 16 experts and top-4. K is
    given; F, a multiple of `multiple`, follows from the active size and E from the total. The
    projections, the router and the shared expert are paid for by the experts.
    """
    model = ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=4 * d_model,
        moe=MoEConfig(kind="dense"),
    )
    active = parameters(model)[1]
    total = active + 3 * n_layers * 12 * d_model**2
    if kind == "dense":
        return model
    d_latent = (
        d_model if kind == "moe" else d_latent or (head_width if kind == "latent" else d_model)
    )
    heads = d_latent // head_width if kind == "multi_head_latent" else 1

    def shape(n_experts: int, d_expert: int) -> ModelConfig:
        return replace(
            model,
            moe=MoEConfig(
                kind=kind,
                n_experts=n_experts,
                top_k=top_k,
                d_expert=d_expert,
                n_heads=heads,
                d_latent=0 if kind == "moe" else d_latent,
                activation=activation,
                d_shared=d_shared,
                latent_norm=latent_norm,
                # the recorded comparison had LatentMoE's router read the sub-token
                router=replace(router, reads="sub_token") if kind == "latent" else router,
                balance=balance,
            ),
        )

    n_experts, d_expert = 4 * top_k, 4
    for _ in range(3):  # E and F depend on each other a little, through the router
        d_expert = _nearest(
            lambda f, e=n_experts: parameters(shape(e, f))[1], active, multiple, multiple
        )
        n_experts = _nearest(lambda e, f=d_expert: parameters(shape(e, f))[0], total, top_k, 1)
    return shape(n_experts, d_expert)


def _nearest(size, target: int, start: int, step: int) -> int:
    """The n in start, start + step, … whose size(n), which rises, lies nearest to the target."""
    n = start
    while size(n + step) <= target:
        n += step
    return n if target - size(n) <= size(n + step) - target else n + step
