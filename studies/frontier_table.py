"""The best design of each budget, from the rows of studies, in one table.

B1: executed FLOPs and total parameters (`latent_vs_flat`). B2: executed FLOPs and bytes per token
(`frontiers`). B3, weights and optimiser of a rank, are total parameters, which are alike in both.
B4: CPU time, and B5: the time that `headway plan` predicts on clusters at width 4,096 with the
same ratios (`step_times`): losses are those of width 128, and no cluster was there."""

import math
from collections.abc import Sequence
from statistics import mean

import numpy as np

from headway.lab.rows import Row, of_one_text
from headway.lab.statistics import ALPHA, t_interval
from headway.lab.study import Contrast
from studies.arms import PAIRS, differences
from studies.frontier_arms import CONFIRMED, EARLY, LATE, SHARED
from studies.step_times import CPU

BUDGETS = {
    "B1, FLOPs and parameters": ("flat", "2x64", "2 slices"),
    "B2, FLOPs and bytes per token": (SHARED, *(name for name in CONFIRMED if name != SHARED)),
}
"""Budget → its arms, first the best flat mixture of the screening seeds, the baseline."""
TIMED = {"2x64": "heads", "2 slices": "slices"}
"""Arm → its design in `step_times`: two heads at width 128, eight where their width allows it."""


def frontiers(rows: Sequence[Row]) -> list[Row]:
    """Return for each budget the best design beside the baseline by the confirming seeds, once all
    are there, its difference to the baseline with a 95% interval, and which of them wins: None
    where the interval holds 0."""
    runs, times = ([row for row in rows if key in row] for key in ("stage", "over flat"))
    table: list[Row] = []
    for budget, (baseline, *others) in BUDGETS.items():
        for steps in (EARLY, LATE):
            pairs = {
                arm: differences(runs, "confirm", Contrast(arm, baseline, steps)) for arm in others
            }
            table += winner(budget, steps, baseline, pairs)
    bits = losses(runs)
    for where in dict.fromkeys(row["where"] for row in times):
        n = 2 if where == CPU else 8
        ratio = {
            row["design"]: row["over flat"]
            for row in reversed(times)
            if row["where"] == where  # of two assumptions on experts, the plan's own is the first
        }
        pairs = {arm: at_equal_time(bits, arm, ratio[f"{n} {name}"]) for arm, name in TIMED.items()}
        budget = f"{'B4, time' if where == CPU else 'B5, time by the plan'} ({where})"
        table += winner(budget, LATE, "flat", pairs)
    return table


def winner(budget: str, steps: int, baseline: str, pairs: dict[str, list[float]]) -> list[Row]:
    """Return the row of a budget; none where pairs are missing. The interval is of the best of all,
    which the same seeds chose: it has Bonferroni's level for so many."""
    if min(map(len, pairs.values())) < PAIRS:
        return []
    best = min(pairs, key=lambda arm: mean(pairs[arm]))
    low, high = t_interval(pairs[best], ALPHA / len(pairs))
    verdict = "better" if high < 0 else "worse" if low > 0 else "cannot_tell"
    return [
        {
            "budget": budget,
            "steps": steps,
            "baseline": baseline,
            "best other": best,
            "difference": mean(pairs[best]),
            "low": low,
            "high": high,
            "seeds": len(pairs[best]),
            "verdict": verdict,
            "winner": {"better": best, "worse": baseline}.get(verdict),
        }
    ]


Losses = dict[tuple[str, int], dict[int, float]]


def losses(runs: Sequence[Row]) -> Losses:
    """Return (arm, seed) → steps → bits per byte, of confirming runs on one text that
    did not diverge."""
    bits: Losses = {}
    for row in of_one_text([row for row in runs if row["stage"] == "confirm"]):
        if row["bits_per_byte"] is not None:
            bits.setdefault((row["arm"], row["seed"]), {})[row["budget"]] = row["bits_per_byte"]
    return bits


def at_equal_time(bits: Losses, arm: str, ratio: float) -> list[float]:
    """Return the paired differences to flat where each step of `arm` takes `ratio` of flat's: the
    slower one has fewer than `LATE` steps. Its loss there is interpolated over log steps, which is
    above the curve, so that it errs against the slower one."""
    pairs = []
    for (name, seed), curve in bits.items():
        flat = bits.get(("flat", seed), {})
        if name == arm and min(len(curve), len(flat)) > 1 and LATE in curve and LATE in flat:
            mine, its = (LATE / ratio, LATE) if ratio > 1 else (LATE, LATE * ratio)
            pairs.append(interpolated(curve, mine) - interpolated(flat, its))
    return pairs


def interpolated(curve: dict[int, float], steps: float) -> float:
    """Return the loss after so many steps, linearly over their logarithm."""
    known = sorted(curve)
    assert known[0] <= steps <= known[-1]
    return float(
        np.interp(math.log(steps), [math.log(n) for n in known], [curve[n] for n in known])
    )
