"""Can Multi-Head LatentMoE match, or beat, a flat MoE, and is it the projections that it pays for?

All arms have the executed FLOPs per token and the total parameters of the flat mixture within 1%,
and the executed FLOPs of training within 0.3%. Budgets are branches of one trunk. The margin 0.005
bits per byte is worth about 2% of training. `2x64` is the published form with two heads of width
64; in `2 slices` the heads have no learned projections, sub-tokens are slices of the block's normed
input. The experts' learning rate of each arm is the one of 0.7, 1 and 1.4 times the recipe's with
the lowest mean loss of the screening seeds, which confirm nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any

from headway.lab.experiment import Arm
from headway.lab.study import Claim, Contrast, Prediction, Study
from studies import frontiers, levers
from studies.arms import WHERE, flat, heads, rated, series, slices

MARGIN = 0.005
CORPUS = "python"
SCREEN, CONFIRM = (0, 1), tuple(range(101, 109))
BUDGETS = (250, 500, 1000, 2000)
RATES = (0.7, 1.4)
"""Factors of the experts' learning rate that are screened beside 1."""


def not_worse(id: str, arm: str, steps: int, expected: float, text: str, base="flat") -> Claim:
    """Return the claim that an arm is not worse than flat by the margin."""
    prediction = Prediction.within(expected, 0.02)
    contrast = (Contrast(arm, base, steps),)
    source = "arXiv 2602.04870, at equal executed FLOPs"
    return Claim(id, text, source, contrast, "not_worse", CORPUS, MARGIN, 8, prediction)


SUBTOKEN: dict[str, Any] = {"model__moe__router__reads": "latent"}
"""Eight routers that read the whole token would cost more than a quarter of the layer."""
FORMS: tuple[Callable[..., Arm], ...] = (flat, partial(heads, n=2), partial(slices, n=2))
PUBLISHED = "the published form, two heads of 64, is not worse than flat"
SLICES = "two heads of 64 without projections are not worse than flat"
CLAIMS = (
    not_worse("C1-500", "2x64", 500, 0.005, PUBLISHED),
    not_worse("C1-1000", "2x64", 1000, -0.010, PUBLISHED),
    not_worse("C1-2000", "2x64", 2000, -0.010, PUBLISHED),
    not_worse("C2-250", "2 slices", 250, -0.010, SLICES),
    not_worse("C2-1000", "2 slices", 1000, 0.020, SLICES),
    not_worse("C2-2000", "2 slices", 2000, 0.020, SLICES),
    not_worse("C3-4x32", "4x32", 1000, 0.005, "four heads of 32 are not worse than flat"),
    not_worse(
        "C3-8x16",
        "8x16",
        1000,
        0.020,
        "eight heads of 16, routed by their sub-tokens, are not worse than flat",
    ),
    not_worse("C3-4-slices", "4 slices", 1000, 0.030, "four slices of 32 are not worse than flat"),
    not_worse(
        "C3-D256",
        "8x32, D 256",
        1000,
        0.005,
        "at width 256 eight heads of 32 are not worse than flat",
        "flat, D 256",
    ),
    not_worse(
        "C4-D256",
        "4x64, D 256",
        1000,
        -0.005,
        "at width 256 the published form, four heads of 64, is not worse than flat",
        "flat, D 256",
    ),
    Claim(
        "C5",
        "the order turns: without projections heads are better at 250 steps, with them at 1,000",
        "runs of 250 to 1,000 steps on a smaller text, four seeds",
        (Contrast("2 slices", "2x64", 250), Contrast("2x64", "2 slices", 1000)),
        "ordered",
        CORPUS,
        0.0,
        8,
        Prediction(-0.020, -0.040, 0.0),
    ),
)
STUDY = Study(
    "latent_vs_flat",
    "Can Multi-Head LatentMoE match, or beat, a flat MoE?",
    (
        *(
            series(
                "screen",
                CORPUS,
                tuple(rated(form, CORPUS, rate=r) for form in FORMS),
                SCREEN,
                (500,),
            )
            for r in (1.0, *RATES)
        ),
        series("confirm", CORPUS, tuple(rated(form, CORPUS) for form in FORMS), CONFIRM, BUDGETS),
        series(
            "confirm",
            CORPUS,
            (
                rated(flat, CORPUS),
                rated(heads, CORPUS, 4),
                rated(heads, CORPUS, 8, **SUBTOKEN),
                rated(slices, CORPUS, 4),
            ),
            CONFIRM,
            (1000,),
        ),
        series(
            "confirm",
            CORPUS,
            (
                rated(flat, CORPUS, width=256),
                rated(heads, CORPUS, 4, width=256),
                rated(heads, CORPUS, 8, width=256),
            ),
            CONFIRM,
            (1000,),
        ),
    ),
    CLAIMS,
    notes=f"{WHERE} `D 256`: width 256. `rate` is a factor on the experts' learning rate; by the "
    "screening it is 0.7 for `2x64` and `2 slices`, and 1 for others and in `levers`.",
    tables={"levers": levers.table, "frontiers": frontiers.frontiers},
    also=("levers", "frontiers", "step_times"),
)
