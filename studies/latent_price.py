"""What does Multi-Head LatentMoE pay for its projections, and what do heads give in return?

C6 takes its gap to the flat mixture apart: `lean` is flat with the experts of `2x64`, at as many
tokens, so it lacks the FLOPs of the projections. Flat − lean is their price, `2x64` − lean what
heads add. C7 and C8 match as the paper does, (E, k, F) with the projections on top, at as many
tokens; what that costs is in the table. All others have the executed FLOPs and the total parameters
of a flat mixture within 1%. `flat`, `2x64` and `2 slices` are those of `latent_vs_flat`, which
shares their runs in one `--dir`."""

from collections.abc import Sequence
from statistics import mean

from headway.lab.experiment import Arm
from headway.lab.rows import Row, of_one_text
from headway.lab.statistics import Region
from headway.lab.study import Claim, Contrast, Prediction, Series, Study
from studies.arms import RATE, WHERE, at_each, flat, heads, rated, series, slices

CORPUS, MARGIN, SEEDS = "python", 0.005, tuple(range(101, 109))
EARLY, LATE = 250, 2000
"""Budgets at which seeds differ little (`noise_floor`)."""
RATIOS = (2, 3, 5, 8)
"""K·F over D; the projections are 2/(2 + 3·K·F/D) of the layer's FLOPs."""


def two(name: str, n_experts: int = 40, top_k: int = 8, d_expert: int = 50) -> Arm:
    """Return two heads with projections, at the experts' rate that was screened for `2x64`."""
    return heads(
        CORPUS,
        2,
        name,
        optim__expert_lr_scale=RATE["2x64"],
        model__moe__n_experts=n_experts,
        model__moe__top_k=top_k,
        model__moe__d_expert=d_expert,
    )


def alone(arm: Arm) -> Series:
    """Return runs of the sizes that an arm has, at as many tokens as the flat mixture."""
    return series("confirm", CORPUS, (arm,), SEEDS, (EARLY, LATE))


def pair(what: str, steps: tuple[int, ...], n_experts: int = 32, d_expert: int = 48) -> Series:
    """Return flat with these experts, and `2x64` of its FLOPs and parameters."""
    baseline = flat(
        CORPUS, f"flat, {what}", model__moe__n_experts=n_experts, model__moe__d_expert=d_expert
    )
    return series("confirm", CORPUS, (baseline, two(f"2x64, {what}")), SEEDS, steps)


SAID = {
    "C6-price": "flat gains by the FLOPs that projections cost",
    "C6-heads": "two heads are not worse than flat with as many FLOPs in experts",
    "C7": "two heads with flat's experts, and projections on top, are not worse than flat",
    "C8": "two heads with twice as many experts, half as wide, are better than flat",
    "C10": "two slices are better than flat with as many, as small experts per token",
    "C11": "with twice the experts in both, two heads are not worse than flat",
}


def claim(
    id: str,
    arm: str,
    baseline: str,
    region: Region,
    expected: tuple[float, float],
    margin: float = MARGIN,
) -> tuple[Claim, ...]:
    """Return a claim at each budget, and what is expected at each, ± 0.02."""
    source = "arXiv 2602.04870, taken apart"
    contrast = Contrast(arm, baseline, LATE)
    either = Claim(id, SAID[id], source, (contrast,), region, CORPUS, margin, len(SEEDS))
    values = (Prediction.within(value, 0.02) for value in expected)
    return at_each(dict(zip((EARLY, LATE), values, strict=True)), either)


SHARE_LAW = Claim(
    "C9",
    "the gap of the published form to flat grows with the share of its projections",
    "the cost formula of the layer",
    tuple(Contrast(f"2x64, K·F {n} D", f"flat, K·F {n} D", EARLY) for n in RATIOS),
    "slope",
    CORPUS,
    0.0,
    len(SEEDS),
    Prediction(0.05, -0.05, 0.15),
    x=tuple(2 / (2 + 3 * n) for n in RATIOS),
)
LEAN, PAPER, FINE, SMALL = "lean", "2x64, experts of flat", "2x64, twice as fine", "flat, k 16"
CLAIMS = (
    *claim("C6-price", "flat", LEAN, "better", (-0.007, -0.007), 0.0),
    *claim("C6-heads", "2x64", LEAN, "not_worse", (0.0, -0.01)),
    *claim("C7", PAPER, "flat", "not_worse", (-0.007, -0.02)),
    *claim("C8", FINE, "flat", "better", (0.0, -0.02), 0.0),
    SHARE_LAW,
    *claim("C10", "2 slices", SMALL, "better", (-0.03, 0.0), 0.0),
    *claim("C11", "2x64, 2E", "flat, 2E", "not_worse", (0.02, 0.0)),
)


def flops(rows: Sequence[Row]) -> list[Row]:
    """Return the executed training FLOPs of each arm over those of `flat`, in per cent."""
    spent: dict[tuple[str, int], list[float]] = {}
    for row in of_one_text(rows):
        spent.setdefault((row["arm"], row["budget"]), []).append(row["train_flops"])
    return [
        {"arm": arm, "steps": steps, "% FLOPs": 100 * mean(x) / mean(spent["flat", steps])}
        for (arm, steps), x in sorted(spent.items())
        if ("flat", steps) in spent
    ]


STUDY = Study(
    "latent_price",
    "What does Multi-Head LatentMoE pay for its projections, and what do heads give in return?",
    (
        series(
            "confirm",
            CORPUS,
            (
                rated(flat, CORPUS),
                rated(heads, CORPUS, 2),
                rated(slices, CORPUS, 2),
                flat(CORPUS, SMALL, model__moe__top_k=16, model__moe__d_expert=24),
            ),
            SEEDS,
            (EARLY, LATE),
        ),
        alone(flat(CORPUS, LEAN, model__moe__n_experts=41, model__moe__d_expert=35)),
        alone(two(PAPER, 32, 8, 48)),
        alone(two(FINE, 64, 16, 24)),
        pair("2E", (EARLY, LATE), n_experts=64),
        *(pair(f"K·F {n} D", (EARLY,), d_expert=16 * n) for n in RATIOS),
    ),
    CLAIMS,
    notes=f"{WHERE} C6: `lean` is flat with the experts of `2x64` at as many tokens, without the "
    "FLOPs of the projections: flat − lean is their price, `2x64` − lean what heads add. C7 and C8 "
    "match as the paper does: its experts with the projections on top, so more FLOPs (`flops`).",
    tables={"flops": flops},
)
