"""Worlds at the best of four rates: which rate is chosen, and what the rules make of it."""

import pytest

from headway.lab.study import tasks
from studies import worlds_by_rate
from studies.best_rates import RATES, best, name, table
from studies.worlds import DESIGNS, WORLDS


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
    assert [line[f"rate {r:g}"] for r in RATES] == [2, 1, 2, 2]


def judged(shares):
    return {rule.id: rule.judge(rows(shares)).answer for rule in worlds_by_rate.STUDY.rules}


def test_the_rules():
    none = everywhere(0.6)
    assert judged(none) == {
        "sparse": "holds", "recall": "refuted", "rate": "cannot_tell", "s5": "holds",
    }  # fmt: skip
    heads = none | {("recall", "2x32", 2.0): (0.01, 0.02, 0.03)}
    assert judged(heads)["recall"] == "holds"
    # one rate of one design, 0.58 better than its others: on average over designs 0.19
    assert judged(heads)["rate"] == "refuted"
    all_at_two = none | {("recall", d, 2.0): (0.01, 0.01, 0.01) for d in DESIGNS}
    assert judged(all_at_two)["rate"] == "holds"
    fewer = none | {("parity", "dense", 1.0): (0.01, 0.01, 0.6)}
    assert judged(fewer)["sparse"] == "refuted"
    one_fewer = fewer | {("parity", d, 1.0): (0.01, 0.6, 0.6) for d in DESIGNS[1:]}
    assert judged(one_fewer)["sparse"] == "cannot_tell"
    assert judged(none | {("s5", "flat", 4.0): (0.6, 0.01, 0.6)})["s5"] == "refuted"


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
