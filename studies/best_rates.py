"""What designs reach on worlds, each at the best of the rates that were tried."""

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np

from headway.lab.rows import Row
from studies.world_arms import SOLVED
from studies.worlds import DESIGNS, WORLDS

RATES = (0.5, 1.0, 2.0, 4.0)
"""Times the rates of `world_arms`, both optimisers' alike."""
COMPARED = RATES[:3]
"""As many as there are designs."""


class Best(NamedTuple):
    """A design on a world at the rate that solves it with the most seeds; of equals, the one that
    has the fewest targets wrong."""

    rate: float
    solved: int
    wrong: float
    """Share of the targets, the mean over seeds."""


def name(design: str, rate: float) -> str:
    """Return the name of an arm."""
    return f"{design}, rate {rate:g}"


def shares(rows: Sequence[Row], world: str, design: str, rate: float) -> list[float]:
    """Return the share of targets wrong, by seed. Raises KeyError where a run diverged."""
    chosen = [r for r in rows if (r["corpus"], r["arm"]) == (world, name(design, rate))]
    return [r["scores"]["targets wrong"] for r in sorted(chosen, key=lambda r: r["seed"])]


def best(rows: Sequence[Row], world: str, design: str) -> Best | None:
    """Return what a design reaches on a world; a rate at which a run diverged does not count."""
    tried = []
    for rate in RATES:
        try:
            wrong_of_seeds = shares(rows, world, design, rate)
        except KeyError:
            continue
        solved = sum(x < SOLVED for x in wrong_of_seeds)
        tried.append(Best(rate, solved, mean(wrong_of_seeds)))
    return max(tried, key=lambda one: (one.solved, -one.wrong), default=None)


def apart(rows: Sequence[Row], world: str) -> list[float]:
    """Return by how much further rates lie apart than designs, by seed: the range over `COMPARED`
    rates of the mean over designs, less the range over as many designs of the mean over these
    rates. Without any effect it is as often above 0 as below."""
    wrong_DRN = np.array(
        [[shares(rows, world, design, rate) for rate in COMPARED] for design in DESIGNS]
    )
    return (np.ptp(wrong_DRN.mean(0), axis=0) - np.ptp(wrong_DRN.mean(1), axis=0)).tolist()


def table(rows: Sequence[Row]) -> list[Row]:
    """Return solved seeds at each rate, and what the best rate has wrong."""
    lines: list[Row] = []
    for world in WORLDS:
        for design in DESIGNS:
            cells = {f"rate {rate:g}": _solved(rows, world, design, rate) for rate in RATES}
            if all(cells.values()) and (reached := best(rows, world, design)):
                lines.append(
                    {"world": world, "design": design, **cells}
                    | {"best rate": reached.rate, "targets wrong there": f"{reached.wrong:.3f}"}
                )
    return lines


def _solved(rows: Sequence[Row], world: str, design: str, rate: float) -> str:
    """Return how many of the seeds that have run solve a world; "" where none has."""
    chosen = [r for r in rows if (r["corpus"], r["arm"]) == (world, name(design, rate))]
    solved = sum(r["scores"]["targets wrong"] < SOLVED for r in chosen if r["scores"])
    diverged = sum(not r["scores"] for r in chosen)
    more = f", {diverged} diverged" if diverged else ""
    return f"{solved} of {len(chosen)}{more}" if chosen else ""
