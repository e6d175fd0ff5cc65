"""How large are differences that mean nothing? The instrument of the studies of quality.

Flat MoE and two heads of 64, trained with several seeds: how far a paired difference spreads, and
what of it comes from initial values, from the order of the data and from the validation documents;
at several budgets, with 4,096 and 8,192 tokens per step, with near-copies kept on one side of the
split or not. No claims: the protocol of the other studies is chosen by it."""

from functools import partial

from headway.lab.experiment import Arm
from headway.lab.study import Study
from headway.model.init import init_weights
from headway.model.transformer import Transformer
from studies.arms import flat, heads, series

BUDGETS = (250, 500, 1000)
SEEDS = (0, 1, 2, 3)


def redraw(seed: int, model: Transformer) -> None:
    """Give a model the initial values of another seed."""
    config = model.config
    init_weights(model, n_layers=config.n_layers, embed_std=config.init_std, seed=seed)


def pair(corpus: str) -> tuple[Arm, Arm]:
    """Return flat MoE and two heads of 64."""
    return flat(corpus), heads(corpus, 2)


INITS = tuple(
    flat("python", f"flat, initial values of seed {k}", partial(redraw, k)) for k in (1, 2, 3)
)
ORDERS = flat("python", "flat, initial values of seed 0", partial(redraw, 0))
STUDY = Study(
    "noise_floor",
    "How large are differences that mean nothing?",
    (
        series("screen", "python", pair("python"), SEEDS, BUDGETS),
        series("screen", "python, 8k", pair("python, 8k"), SEEDS, (250,)),
        series("screen", "python", INITS, (0,), BUDGETS),
        series("screen", "python", (ORDERS,), (1, 2, 3), BUDGETS),
        *(
            series("screen", corpus, pair(corpus), SEEDS, (250,))
            for corpus in ("python, near-copies split",)
        ),
    ),
)
