"""Which design is best where something else than FLOPs runs out: bytes on the wire, or experts?

B1: executed FLOPs and total parameters, from the runs of `latent_vs_flat`. B2: as many bytes per
token as a flat mixture sends that activates one expert, at eight ranks that share the experts, at
equal executed FLOPs: LatentMoE may send two copies of half the width, or four of a quarter, and
Multi-Head LatentMoE its heads once, whatever k is. Their numbers of experts give them its total
parameters within 2.3%. B3, weights and optimiser of a rank, are total parameters, which are alike
in both."""

from collections.abc import Sequence
from statistics import mean

from headway.lab.statistics import Region, paired
from headway.lab.study import Claim, Contrast, Prediction, Row, Study
from studies.arms import PAIRS, WHERE, differences
from studies.frontier_arms import (
    BEFORE,
    CORPUS,
    DESIGNS,
    EARLY,
    HALF,
    LATE,
    ONE,
    QUARTER,
    SCREEN,
    SEEDS,
    TRAFFIC,
)

MARGIN = 0.005
BUDGETS = {
    "B1, FLOPs and parameters": ("flat", "2x64", "2 slices"),
    "B2, FLOPs and bytes per token": tuple(DESIGNS),
}
"""Budget → its arms, the baseline first."""


def frontiers(rows: Sequence[Row]) -> list[Row]:
    """Return the winner of each budget by the confirming seeds, once all are there, and its
    difference to the baseline with a 95% interval."""
    table: list[Row] = []
    for budget, (baseline, *others) in BUDGETS.items():
        for steps in (EARLY, LATE):
            pairs = {
                arm: x
                for arm in others
                if len(x := differences(rows, "confirm", Contrast(arm, baseline, steps))) >= PAIRS
            }
            if len(pairs) < len(others):
                continue
            best = min(pairs, key=lambda arm: mean(pairs[arm]))
            result = paired(pairs[best])
            assert result.ci95 is not None
            low, high = result.ci95
            table.append(
                {
                    "budget": budget,
                    "steps": steps,
                    "winner": best if result.mean < 0 else baseline,
                    "best other": best,
                    "difference": result.mean,
                    "low": low,
                    "high": high,
                    "seeds": result.n,
                    "verdict": "better" if high < 0 else "worse" if low > 0 else "cannot_tell",
                }
            )
    return table


def claim(id: str, baseline: str, region: Region, text: str, expected: float) -> Claim:
    """Return a claim about heads that send as many bytes as others, at the longest budget."""
    return Claim(
        id,
        text,
        "arXiv 2602.04870: traffic does not depend on k",
        (Contrast(BEFORE, baseline, LATE),),
        region,
        CORPUS,
        MARGIN,
        len(SEEDS),
        Prediction.within(expected, 0.03),
    )


STUDY = Study(
    "frontiers",
    "Which design is best where bytes on the wire run out, and not FLOPs?",
    (SCREEN, TRAFFIC),
    (
        claim(
            "C12", ONE, "better", "heads are better than flat where each sends D per token", -0.03
        ),
        claim(
            "C13-half", HALF, "not_worse", "two heads are not worse than LatentMoE, ℓ = D/2", -0.01
        ),
        claim(
            "C13-quarter",
            QUARTER,
            "not_worse",
            "two heads are not worse than LatentMoE, ℓ = D/4",
            0.0,
        ),
    ),
    notes=f"{WHERE} Here arms send as many bytes per token as `flat, k 1` at eight ranks, at equal "
    "FLOPs; total parameters agree within 2.3%. The winner is chosen by the seeds that confirm it, "
    "and its interval is not adjusted for that; the claims are.",
    tables={"frontiers": frontiers},
    also=("latent_vs_flat",),
)
