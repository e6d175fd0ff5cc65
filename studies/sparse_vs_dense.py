"""Is a sparse feed-forward layer better than a dense one of the same FLOPs?

The dense network has the executed FLOPs per token of the flat mixture within 1%, and those of
training within 0.3%. The arms are those of `latent_vs_flat`, which shares their runs: with one
`--dir` each is trained once. Claims are made where models do not copy yet, and where all do
(`noise_floor`)."""

import dataclasses

from headway.lab.experiment import Arm
from headway.lab.study import Claim, Contrast, Prediction, Series, Study
from studies.arms import WHERE, design, flat, heads, rated, series
from studies.latent_vs_flat import CORPUS, MARGIN

SEEDS, BUDGETS = (101, 102, 103, 104), (250, 2000)


def dense_series() -> Series:
    """Return the dense network beside the flat mixture, whose FLOPs alone it can have."""
    both = series(
        "confirm", CORPUS, (flat(CORPUS), Arm("dense", design("dense", CORPUS))), SEEDS, BUDGETS
    )
    return dataclasses.replace(
        both, experiment=dataclasses.replace(both.experiment, match=("active-flops",))
    )


def better(id: str, arm: str, steps: int, expected: float) -> Claim:
    """Return the claim that an arm is better than dense by more than the margin."""
    return Claim(
        id,
        f"{arm} is better than a dense network of its FLOPs",
        "400 steps on the standard library, three seeds",
        (Contrast(arm, "dense", steps),),
        "better",
        CORPUS,
        MARGIN,
        len(SEEDS),
        Prediction.within(expected, 0.02),
    )


STUDY = Study(
    "sparse_vs_dense",
    "Is a sparse layer better than a dense one of the same FLOPs?",
    (
        dense_series(),
        series("confirm", CORPUS, (rated(flat, CORPUS), rated(heads, CORPUS, 2)), SEEDS, BUDGETS),
    ),
    (
        better("flat-250", "flat", 250, -0.060),
        better("flat-2000", "flat", 2000, -0.050),
        better("2x64-250", "2x64", 250, -0.060),
        better("2x64-2000", "2x64", 2000, -0.050),
    ),
    notes=f"{WHERE} `dense` has the FLOPs of `flat` and fewer parameters. The runs of `flat` and "
    "`2x64` are those of `latent_vs_flat`, which was registered before; those of `dense` were made "
    "after this study was registered.",
)
