"""What would make Multi-Head LatentMoE better, at equal executed FLOPs and total parameters?

One change of `2x64` each, two heads of 64 at width 128, after 250 steps: so early, paired
differences spread by 0.003 bits per byte (`noise_floor`), and models do not copy yet. What helps
here is confirmed at longer budgets in `latent_vs_flat`."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from headway.lab.experiment import Arm
from headway.lab.rows import Row
from headway.lab.study import Contrast, Study
from studies import lever_layers as layers
from studies.arms import PAIRS, WHERE, differences, flat, heads, series, slices

CORPUS, SEEDS, STEPS, BASE = "python", (0, 1), 250, "2x64"


def lever(name: str, kind: type[layers.Changed] | None = None, n: int = 2, **fields: Any) -> Arm:
    """Return `2x64` with its layers changed, or fields of its config."""
    return heads(CORPUS, n, name, layers.change(kind) if kind else None, **fields)


def sliced(name: str, kind: type[layers.Changed]) -> Arm:
    """Return two heads without projections, with their layers changed."""
    return slices(CORPUS, 2, name, layers.change(kind))


LEVERS: Mapping[str, tuple[Arm, float]] = {
    arm.name: (arm, prediction)
    for arm, prediction in (
        (slices(CORPUS, 2, "L1 slices"), -0.020),
        (sliced("L2 fixed permutation", layers.Permuted), -0.018),
        (sliced("L3 fixed rotation", layers.Rotated), -0.018),
        (sliced("L4 rotation, diagonals", layers.RotatedScaled), -0.019),
        (lever("L5 W_in alone", layers.InOnly), -0.008),
        (lever("L6 W_out alone", layers.OutOnly), -0.006),
        (lever("L7 Monarch", layers.Monarch), -0.008),
        (lever("L8 orthogonal start", layers.Orthogonal), -0.003),
        (lever("L9 tied", layers.Tied), 0.002),
        (lever("L10 one W_in, W_out for all", layers.Shared), 0.003),
        (lever("L11 GELU behind W_in", layers.Gelu), -0.003),
        (lever("L16 three layers", model__n_layers=3), 0.002),
        (lever("L18 gates of heads", layers.HeadGates), -0.003),
        (lever("L20 norm of the output", layers.OutputNorm), -0.003),
        (lever("L21 fixed scale", layers.FixedScale), 0.003),
        (lever("L25 half the width, twice the experts", model__moe__d_latent=64), 0.010),
    )
}
"""Name → arm, and the difference to `2x64` that was expected."""


CONFIRMED: Mapping[str, str] = {"L1 slices": "2 slices"}
"""Lever → the arm that confirms it in `latent_vs_flat`, where it has another name."""


def table(rows: Sequence[Row]) -> list[Row]:
    """Return each lever's mean difference to `2x64`: predicted, of the screening seeds, and of the
    confirming ones at the longest budget at which all are there. Measurements are passed over."""
    rows = [row for row in rows if "stage" in row]
    budgets: dict[str, set[int]] = {}
    for row in rows:
        if row["stage"] == "confirm":
            budgets.setdefault(row["arm"], set()).add(row["budget"])
    levers: list[Row] = []
    for name, (_, prediction) in LEVERS.items():
        screen = differences(rows, "screen", Contrast(name, BASE, STEPS))
        arm = CONFIRMED.get(name, name)
        confirm: list[float] = []
        for steps in sorted(budgets.get(arm, set()) & budgets.get(BASE, set())):
            pairs = differences(rows, "confirm", Contrast(arm, BASE, steps))
            confirm = pairs if len(pairs) >= min(len(confirm), PAIRS) else confirm
        if screen or confirm:
            levers.append(
                {
                    "name": name,
                    "prediction": prediction,
                    "screen": mean(screen) if screen else None,
                    "screening seeds": len(screen),
                    "sd of a pair": stdev(screen) if len(screen) > 1 else None,
                    "confirm": mean(confirm) if len(confirm) >= PAIRS else None,
                    "confirming seeds": len(confirm),
                }
            )
    return levers


STUDY = Study(
    "levers",
    "What would make Multi-Head LatentMoE better, at equal FLOPs and parameters?",
    (
        series(
            "screen",
            CORPUS,
            (flat(CORPUS), heads(CORPUS, 2), *(arm for arm, _ in LEVERS.values())),
            SEEDS,
            (STEPS,),
        ),
    ),
    notes=f"{WHERE} Differences to `2x64` at {STEPS} steps; a lever changes one thing of it. One "
    "or two seeds screen, and prove nothing.",
    tables={"levers": table},
)
