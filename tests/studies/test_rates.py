"""The best rate of a mixture and a seed, and what its shift says."""

import math

import pytest

from studies import rates
from studies.rates import STUDY, best, moves


def _rows(vertices: dict[str, list[float]]) -> list[dict]:
    """Losses that are parabolas with these vertices, by mixture and seed."""
    return [
        {
            "corpus": "stdlib",
            "arm": f"{mixture}: 2^{k}",
            "seed": seed,
            "bits_per_byte": 3 + 0.1 * (k - vertex) ** 2,
        }
        for mixture, of_seeds in vertices.items()
        for seed, vertex in zip(rates.SEEDS, of_seeds, strict=True)
        for k in range(-9, -2)
    ]


@pytest.mark.parametrize(
    ("shift", "answer"),
    [(0.25, "holds"), (-0.25, "holds"), (0.6, "refuted"), (-2.0, "refuted"), (0.5, "cannot_tell")],
)
def test_a_shift_is_judged_by_its_whole_interval(shift, answer):
    noise = [0.0, 0.02, -0.02, 0.0]
    rows = _rows({"a": [-6.0] * 4, "b": [-6 + shift + x for x in noise]})
    assert best(rows, "b", rates.SEEDS[1]) == pytest.approx(-6 + shift + 0.02)
    said = moves("a", "b", 0.0, 1.0, rows)
    assert said.answer == answer and f"{2 * shift:+.2f} steps" in said.why
    opposite = {"holds": "refuted", "refuted": "holds", "cannot_tell": "cannot_tell"}
    assert moves("a", "b", 1.0, 99.0, rows).answer == opposite[answer]


def test_a_best_rate_outside_of_those_tried_tells_nothing():
    rows = _rows({"a": [-6.0] * 4, "b": [-1.0] * 4})
    assert math.isnan(best(rows, "b", rates.SEEDS[0]))
    assert moves("a", "b", 2.0, 99.0, rows).answer == "cannot_tell"
    for row in rows:
        row["bits_per_byte"] = None  # diverged
    assert moves("a", "b", 2.0, 99.0, rows).answer == "cannot_tell"


def test_arms_differ_in_what_they_are_named_by():
    arms = {arm.name: arm.config for part in STUDY.series for arm in part.experiment.arms}
    assert len(arms) == 26
    assert arms["128: 2^-6"].optim.transfer == "none" and arms["128: 2^-6"].optim.lr == 2**-6
    fine = arms["32 by width, fine: 2^-4"]
    assert (fine.optim.transfer, fine.optim.base_width) == ("width", 32)
    assert (fine.model.moe.n_experts, fine.model.moe.top_k, fine.model.moe.d_expert) == (32, 8, 8)
    assert {rule.id for rule in STUDY.rules} == {"with", "without", "granularity"}
