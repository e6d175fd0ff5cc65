"""What designs reach on worlds, each at the best of the rates that were tried."""

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from headway.lab.rows import Row
from studies.world_arms import SOLVED
from studies.worlds import DESIGNS, WORLDS

RATES = (0.5, 1.0, 2.0, 4.0)
"""Times the rates of `world_arms`, both optimisers' alike."""


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


def best(rows: Sequence[Row], world: str, design: str) -> Best:
    """Return what a design reaches on a world; a rate at which a run diverged does not count."""
    tried = []
    for rate in RATES:
        try:
            wrong_of_seeds = shares(rows, world, design, rate)
        except KeyError:
            continue
        solved = sum(x < SOLVED for x in wrong_of_seeds)
        tried.append(Best(rate, solved, mean(wrong_of_seeds)))
    return max(tried, key=lambda one: (one.solved, -one.wrong))


def table(rows: Sequence[Row]) -> list[Row]:
    """Return solved seeds at each rate, and what the best rate has wrong."""
    rows = [row for row in rows if row["scores"]]
    lines: list[Row] = []
    for world in WORLDS:
        for design in DESIGNS:
            wrongs = {rate: shares(rows, world, design, rate) for rate in RATES}
            if all(wrongs.values()):
                solved = {f"rate {r:g}": sum(x < SOLVED for x in wrongs[r]) for r in RATES}
                reached = best(rows, world, design)
                lines.append(
                    {"world": world, "design": design, **solved}
                    | {"best rate": reached.rate, "targets wrong there": f"{reached.wrong:.3f}"}
                )
    return lines
