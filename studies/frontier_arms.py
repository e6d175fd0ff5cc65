"""Designs that send as many bytes per token as a flat mixture that activates one expert.

At eight ranks that share the experts, at equal executed FLOPs: flat sends one copy of the token,
LatentMoE two of half the width or four of a quarter, Multi-Head LatentMoE its heads once, whatever
k is. Their numbers of experts give all the same total parameters within 2.3%. What is tried of each
on the screening seeds is its experts' learning rate and another rule of balance."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from headway.lab.experiment import Arm
from studies.arms import design, flat, heads, series

CORPUS, SEEDS = "python", tuple(range(101, 109))
EARLY, LATE = 250, 2000
"""Budgets at which seeds differ little (`noise_floor`)."""
ONE, SHARED, HALF, QUARTER, BEFORE, AFTER = (
    "flat, k 1",
    "flat, k 1, shared expert",
    "latent, k 2",
    "latent, k 4",
    "two heads, routed before",
    "two heads, routed after",
)
"""Designs that send as many bytes. Heads that are routed before the exchange, by the whole token,
send the numbers and gates of their experts too, and are narrower for that."""


def latent(name: str, top_k: int, n_experts: int, **fields: Any) -> Arm:
    """Return LatentMoE; its width and the experts' are solved."""
    sizes = {"model__moe__top_k": top_k, "model__moe__n_experts": n_experts}
    return Arm(name, design("latent", CORPUS, **sizes, **fields))


TOP1 = {
    "model__moe__top_k": 1,
    "model__moe__router__gate": "softmax_topk",  # over one score the other gate is 1, always
}
ONE_EXPERT = {**TOP1, "model__moe__n_experts": 4, "model__moe__d_expert": 391}
"""With the FLOPs of eight experts of 48."""
ONE_AND_SHARED = {
    **TOP1,
    "model__moe__n_experts": 7,
    "model__moe__d_expert": 195,
    "model__moe__d_shared": 195,
}
SUBTOKEN = {"model__moe__router__reads": "latent"}
QUANTILE = {"model__moe__balance__aux": 0.0, "model__moe__balance__bias": "quantile"}
SEARCHED = {
    "": {},
    ", rate 0.7": {"optim__expert_lr_scale": 0.7},
    ", rate 1.4": {"optim__expert_lr_scale": 1.4},
    ", quantile bias": QUANTILE,
}
"""What is tried of each design on the screening seeds: factors of the experts' learning rate, and
another rule of balance."""
DESIGNS: dict[str, Callable[..., Arm]] = {
    ONE: partial(flat, CORPUS, **ONE_EXPERT),
    SHARED: partial(flat, CORPUS, **ONE_AND_SHARED),
    HALF: partial(latent, top_k=2, n_experts=9),
    QUARTER: partial(latent, top_k=4, n_experts=17),
    BEFORE: partial(heads, CORPUS, 2),
    AFTER: partial(heads, CORPUS, 2, **SUBTOKEN),
}


def searched(name: str, by: str) -> Arm:
    """Return a design with one of the variants that are tried."""
    return DESIGNS[name](name=name + by, **SEARCHED[by])


AS_MANY_BYTES: dict[str, Any] = {
    "match": ("active-flops", "traffic"),
    "free": ("d_expert", "d_latent"),
}
SCREEN = series(
    "screen",
    CORPUS,
    tuple(searched(name, by) for by in SEARCHED for name in DESIGNS),
    (0, 1),
    (500,),
    **AS_MANY_BYTES,
)
CONFIRMED = {
    ONE: ", quantile bias",
    SHARED: ", quantile bias",
    HALF: ", rate 0.7",
    QUARTER: ", rate 0.7",
    BEFORE: ", rate 0.7",
}
"""Design → its variant with the lowest mean loss of the screening seeds, which confirm nothing."""
TRAFFIC = series(
    "confirm",
    CORPUS,
    tuple(replace(searched(name, by), name=name) for name, by in CONFIRMED.items()),
    SEEDS,
    (EARLY, LATE),
    **AS_MANY_BYTES,
)
