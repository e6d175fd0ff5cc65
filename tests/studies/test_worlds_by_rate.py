"""Worlds at the best of four rates: which rate is chosen, and what the rules make of it."""

from pathlib import Path

import numpy as np
import pytest

from headway.config import UsageError
from headway.lab.registered import read
from headway.lab.study import tasks
from studies import best_rates, worlds_by_rate
from studies.best_rates import RATES, apart, best, name, table
from studies.worlds import DESIGNS, WORLDS

STUDIES = Path(worlds_by_rate.__file__).parent


def rows(shares):
    """(world, design, rate) → the share of targets wrong of each seed; None of one that diverged."""
    return [
        {
            "corpus": world, "arm": name(design, rate), "seed": seed,
            "scores": {} if wrong is None else {"targets wrong": wrong},
        }
        for (world, design, rate), of_seeds in shares.items()
        for seed, wrong in enumerate(of_seeds)
    ]  # fmt: skip


def everywhere(wrong):
    return {(w, d, r): (wrong,) * 3 for w in WORLDS for d in DESIGNS for r in RATES}


def test_the_best_rate_has_most_seeds_and_then_the_fewest_wrong():
    shares = {
        ("recall", "flat", 0.5): (0.04, 0.04, 0.9),
        ("recall", "flat", 1.0): (0.01, 0.3, 0.06),
    }
    shares |= {
        ("recall", "flat", 2.0): (0.01, 0.02, 0.9),
        ("recall", "flat", 4.0): (0.0, None, 0.0),
    }
    assert best(rows(shares), "recall", "flat") == (2.0, 2, pytest.approx(0.31))
    (line,) = table(rows(shares))
    assert [line[f"rate {r:g}"] for r in RATES] == [
        "2 of 3", "1 of 3", "2 of 3", "2 of 3, 1 diverged",
    ]  # fmt: skip
    assert (line["best rate"], line["targets wrong there"]) == (2.0, "0.310")


def judged(shares):
    return {rule.id: rule.judge(rows(shares)).answer for rule in worlds_by_rate.STUDY.rules}


def test_the_rules():
    none = everywhere(0.6)
    assert judged(none) == {
        "sparse": "holds", "recall": "refuted", "rate": "cannot_tell", "s5": "holds",
    }  # fmt: skip
    heads = none | {("recall", "2x32", 2.0): (0.01, 0.02, 0.03)}
    assert judged(heads)["recall"] == "holds"
    # of one design at one rate: both ranges are a third of it
    assert judged(heads)["rate"] == "cannot_tell"
    rated = none | {("recall", d, 2.0): (0.01, 0.02, 0.015) for d in DESIGNS}
    assert judged(rated)["rate"] == "holds"
    designed = none | {("recall", "flat", r): (0.01, 0.02, 0.015) for r in RATES}
    assert judged(designed)["rate"] == "refuted"
    fewer = none | {("parity", "dense", 1.0): (0.01, 0.01, 0.6)}
    assert judged(fewer)["sparse"] == "refuted"
    one_fewer = fewer | {("parity", d, 1.0): (0.01, 0.6, 0.6) for d in DESIGNS[1:]}
    assert judged(one_fewer)["sparse"] == "cannot_tell"
    # also at a rate at which another run diverged
    assert judged(none | {("s5", "flat", 4.0): (0.6, 0.01, None)})["s5"] == "refuted"
    assert judged(none | {("s5", "flat", 4.0): (0.6, 0.4, None)})["s5"] == "cannot_tell"


def test_rates_and_designs_without_effect_lie_as_far_apart():
    rng = np.random.default_rng(0)
    values = []
    for _ in range(300):
        shares = {
            ("recall", d, r): tuple(rng.normal(0.5, 0.1, 3).tolist())
            for d in DESIGNS
            for r in RATES
        }
        values += apart(rows(shares), "recall")
    assert abs(np.mean(values)) < 4 * np.std(values) / len(values) ** 0.5
    assert 0.45 < np.mean(np.array(values) > 0) < 0.55


def test_arms_differ_in_their_rates_and_have_the_flops_of_the_dense_one():
    planned = {(t.corpus, t.arm): t.planned for t in tasks(worlds_by_rate.STUDY)}
    assert len(planned) == len(WORLDS) * len(DESIGNS) * len(RATES)
    for (world, arm), by_steps in planned.items():
        (one,) = by_steps.values()
        rate = float(arm.rpartition(" ")[2])
        assert one.config.optim.muon_lr == pytest.approx(0.01 * rate)
        assert one.config.optim.lr == pytest.approx(3e-3 * rate)
        (base,) = planned[world, name("dense", rate)].values()
        assert one.train_flops == pytest.approx(base.train_flops, rel=3e-3)
        assert one.config.run.dtype == "float32"


def test_what_decides_is_registered(monkeypatch):
    """Also what the rules read of other modules."""
    read(worlds_by_rate.STUDY, STUDIES)
    monkeypatch.setattr(best_rates, "SOLVED", 0.06)
    with pytest.raises(UsageError, match="claim sparse is not the one registered .* judge_reads"):
        read(worlds_by_rate.STUDY, STUDIES)
