"""Which design is best where bytes on the wire run out, and not FLOPs?

Designs send as many bytes per token (`frontier_arms`); those of the claims are the best that the
screening seeds have of each."""

from headway.lab.statistics import Region
from headway.lab.study import Claim, Contrast, Prediction, Study
from studies.arms import WHERE, at_each
from studies.frontier_arms import (
    BEFORE,
    CORPUS,
    EARLY,
    HALF,
    LATE,
    ONE,
    QUARTER,
    SCREEN,
    SEEDS,
    SHARED,
    TRAFFIC,
)
from studies.frontier_table import frontiers

MARGIN = 0.005
SAID = {
    "C12": "heads are better than flat, of which each token reaches one expert",
    "C12-shared": "heads are better than flat with one expert and a shared one",
    "C13-half": "two heads are not worse than LatentMoE, ℓ = D/2",
    "C13-quarter": "two heads are not worse than LatentMoE, ℓ = D/4",
}


def claim(id: str, baseline: str, region: Region, expected: float) -> tuple[Claim, ...]:
    """Return claims about heads that send as many bytes as others, at both budgets."""
    source = "arXiv 2602.04870: traffic does not depend on k"
    contrast = Contrast(BEFORE, baseline, LATE)
    either = Claim(id, SAID[id], source, (contrast,), region, CORPUS, MARGIN, len(SEEDS))
    return at_each(dict.fromkeys((EARLY, LATE), Prediction.within(expected, 0.03)), either)


STUDY = Study(
    "frontiers",
    "Which design is best where bytes on the wire run out, and not FLOPs?",
    (SCREEN, TRAFFIC),
    (
        *claim("C12", ONE, "better", -0.04),
        *claim("C12-shared", SHARED, "better", -0.02),
        *claim("C13-half", HALF, "not_worse", -0.02),
        *claim("C13-quarter", QUARTER, "not_worse", -0.04),
    ),
    notes=f"{WHERE} Here arms send as many bytes per token as `flat, k 1` at eight ranks, at equal "
    "FLOPs; total parameters agree within 2.3%. `latent, k N` is LatentMoE of width D/N. Heads are "
    "routed before the exchange of Head Parallel, by the whole token, or after it, by sub-tokens. "
    "Each design has the experts' rate or the rule of balance that was best on the screening seeds "
    "(`frontier_arms`). In the table the winner is chosen by the seeds that confirm it, and its "
    "interval is not adjusted for that; the claims are. B1 is of `latent_vs_flat`. B4 and B5 "
    "compare losses at width 128 at equal time: measured on a CPU, or what `headway plan` predicts "
    "for clusters at width 4,096 (`step_times`), where nothing was run; losses between budgets are "
    "interpolated, which errs a little against the slower design.",
    tables={"frontiers": frontiers},
    also=("latent_vs_flat", "step_times"),
)
