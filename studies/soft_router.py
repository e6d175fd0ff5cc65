"""Is a soft mixture, whose experts all serve every token, as good as a sparse one of its FLOPs?

The designs of the study `routers`, and 32 experts a sixteenth as wide together as 64 of theirs, by
softmax gates without selection; in float32, with other seeds."""

import dataclasses

from headway.config import with_leaf
from headway.lab.experiment import Arm
from headway.lab.study import Claim, Contrast, Prediction, Study
from studies.narrow import CORPUS, mixture, series
from studies.routers import ARMS, NO_AUX, STEPS, loads, table

SEEDS = (201, 202, 203)
SOFT = mixture("soft: all of 32 experts", 32, 32, **NO_AUX)


def in_float32(arm: Arm) -> Arm:
    return dataclasses.replace(arm, config=with_leaf(arm.config, "run.dtype", "float32"))


def sparse_is_better(id: str, arm: str) -> Claim:
    return Claim(
        id,
        f"{arm}: a sparse mixture is better than a soft one of its executed FLOPs.",
        "the laboratory's plan: one table of soft and sparse routers",
        (Contrast(arm, SOFT.name, STEPS),),
        "better",
        CORPUS,
        margin=0.0,
        min_seeds=len(SEEDS),
        prediction=Prediction.within(-0.08, 0.06),
    )


STUDY = Study(
    "soft_router",
    "Is a soft mixture as good as a sparse one of its FLOPs?",
    (series(tuple(map(in_float32, (*ARMS, SOFT))), STEPS, SEEDS),),
    claims=(
        sparse_is_better("aux", "softmax over all, auxiliary loss"),
        sparse_is_better("quantile", "sigmoid, quantile bias"),
    ),
    scores=loads,
    notes="Models of width 32, 1M bytes of Python, three seeds. At equal executed FLOPs a soft "
    "mixture has all its parameters active, and a sixteenth of the sparse ones' experts: that is "
    "what sparsity is for. The load is the greatest of both layers, over the last ten records.",
    tables={"routers": table},
)
