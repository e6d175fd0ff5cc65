"""The main pairs of `latent_vs_flat` on English: does what holds on Python hold on another text?

The same arms, rates and claims, where seeds differ little, on the documentation of Linux with near-
copies on one side of the split."""

from headway.lab.study import Claim, Contrast, Prediction, Study
from studies.arms import WHERE, flat, heads, rated, series, slices

CORPUS, MARGIN, SEEDS, BUDGETS = "kernel-docs", 0.005, tuple(range(101, 109)), (250, 2000)


def not_worse(id: str, arm: str, steps: int, expected: float) -> Claim:
    """Return the claim that an arm is not worse than flat by the margin."""
    return Claim(
        id,
        f"{arm} is not worse than flat on English",
        "latent_vs_flat, on Python",
        (Contrast(arm, "flat", steps),),
        "not_worse",
        CORPUS,
        MARGIN,
        len(SEEDS),
        Prediction.within(expected, 0.02),
    )


STUDY = Study(
    "latent_vs_flat_docs",
    "Does what holds on Python, of Multi-Head LatentMoE and a flat MoE, hold on English?",
    (
        series(
            "confirm",
            CORPUS,
            (rated(flat, CORPUS), rated(heads, CORPUS, 2), rated(slices, CORPUS, 2)),
            SEEDS,
            BUDGETS,
        ),
    ),
    (
        not_worse("C1-docs-250", "2x64", 250, 0.007),
        not_worse("C1-docs-2000", "2x64", 2000, -0.005),
        not_worse("C2-docs-250", "2 slices", 250, -0.010),
        not_worse("C2-docs-2000", "2 slices", 2000, 0.010),
    ),
    notes=f"{WHERE} `kernel-docs` is the documentation of Linux, split alike.",
)
