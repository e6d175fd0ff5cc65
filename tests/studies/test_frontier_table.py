"""The table of frontiers: winners by pairs of seeds, at equal steps and at equal time."""

import math

import pytest

from headway.lab.statistics import t_interval
from studies import latent_vs_flat
from studies.frontier_table import at_equal_time, frontiers, interpolated, losses
from studies.step_times import CLUSTERS, CPU

BITS = {"flat": 1.5, "2x64": 1.48, "2 slices": 1.51}


def row(arm: str, seed: int, bits: float | None, steps: int = 2000, stage: str = "confirm") -> dict:
    return {
        "stage": stage, "arm": arm, "seed": seed, "budget": steps, "bits_per_byte": bits,
        "corpus": "python",
    }  # fmt: skip


def rows(steps: int = 2000, higher: float = 0.0) -> list[dict]:
    return [
        row(
            arm,
            seed,
            value + higher + 0.001 * seed + (0.002 if (arm, seed) == ("2x64", 3) else 0),
            steps,
        )
        for arm, value in BITS.items()
        for seed in range(1, 9)
    ]


def times(cpu: float, cluster: float) -> list[dict]:
    """Steps of heads that take so many times flat's; slices take as long as flat."""
    where = {CPU: ("2", cpu)} | {name: ("8", cluster) for name in CLUSTERS}
    return [
        {"where": name, "experts": efficiency, "design": design, "ms": 1.0, "over flat": over}
        for name, (n, ratio) in where.items()
        for efficiency, ratio in ((0.4, ratio), (0.6, 1.0))
        for design, over in (("flat", 1.0), (f"{n} heads", ratio), (f"{n} slices", 1.0))
    ]


def test_the_frontier_names_a_winner_once_all_confirming_pairs_are_there():
    (budget,) = frontiers(rows())
    assert (
        budget["winner"] == "2x64"
        and budget["baseline"] == "flat"
        and budget["verdict"] == "better"
        and budget["seeds"] == 8
    )
    assert budget["difference"] == pytest.approx(-0.02 + 0.002 / 8)
    # the level of a choice among two others
    pairs = [-0.02 + (0.002 if seed == 3 else 0) for seed in range(1, 9)]
    assert (budget["low"], budget["high"]) == pytest.approx(tuple(t_interval(pairs, 0.025)))
    assert frontiers(rows()[:-1]) == []
    assert latent_vs_flat.STUDY.tables["frontiers"] is frontiers


def test_equal_times_are_other_numbers_of_steps():
    """Flat gains 0.1 from 1,000 to 2,000 steps. Where heads step twice as fast, flat has 1,000 of
    its steps; where they are twice as slow, they have 1,000 of theirs. The plan's own assumption
    on experts counts, which is the first of the two."""
    runs = rows() + rows(1000, higher=0.1)
    table = frontiers(runs + times(cpu=2.0, cluster=0.5))
    late = {r["budget"]: r for r in table if r["steps"] == 2000}
    assert len(late) == 1 + 1 + len(CLUSTERS)
    cpu = late[f"B4, time ({CPU})"]
    assert (cpu["winner"], cpu["best other"], cpu["verdict"]) == ("flat", "2 slices", "worse")
    for name in CLUSTERS:
        cluster = late[f"B5, time by the plan ({name})"]
        assert cluster["winner"] == "2x64"
        assert cluster["difference"] == pytest.approx(-0.1 - 0.02 + 0.002 / 8)


def test_losses_are_interpolated_over_log_steps_and_diverged_pairs_left_out():
    assert interpolated({1000: 1.6, 2000: 1.5, 250: 2.0}, 1000 * math.sqrt(2)) == pytest.approx(
        1.55
    )
    runs = [
        *(row("flat", s, 1.6 if steps == 1000 else 1.5, steps) for s in (1, 2) for steps in (1000, 2000)),
        row("2x64", 1, None, 2000), row("2x64", 1, 1.6, 1000),
        row("2x64", 2, 1.5, 2000), row("2x64", 2, 1.7, 1000),
        row("2x64", 3, 1.0, 2000, "screen"),
    ]  # fmt: skip
    bits = losses(runs)
    assert at_equal_time(bits, "2x64", 2.0) == [pytest.approx(1.7 - 1.5)]
    assert at_equal_time(bits, "2x64", 1.0) == [pytest.approx(0.0)]
