"""Verdicts on rows that were made by hand."""

import dataclasses

import numpy as np
import pytest

from headway.config import Config, UsageError
from headway.lab.experiment import Arm, Experiment
from headway.lab.measurement import Verdict as Said
from headway.lab.statistics import t_interval
from headway.lab.studies_page import _means
from headway.lab.study import Claim, Contrast, Prediction, Rule, Series, Study
from headway.lab.verdict import judge, judge_rules
from headway.train.budget import Budget


def claims_of(region, contrasts, margin=0.0, x=(), min_seeds=2):
    c = tuple(Contrast(*contrast) for contrast in contrasts)
    prediction = Prediction(0.0, -0.01, 0.01)
    claim = Claim("X", "", "", c, region, "t", margin, min_seeds, prediction, x=x)
    return Study("s", "", (), (claim,))


def made(values):
    """Rows of arms: (arm, budget) → bits per byte of seeds 1, 2, …"""
    return [
        {
            "stage": "confirm",
            "corpus": "t",
            "arm": arm,
            "seed": seed,
            "budget": budget,
            "bits_per_byte": bits,
            "validation": "v",
            "cpu_seconds": 60.0,
        }
        for (arm, budget), series in values.items()
        for seed, bits in enumerate(series, 1)
    ]


def judged(study, values):
    return judge(study, made(values), {"X"})[0]


def test_rows_of_different_texts_are_not_compared():
    study = claims_of("better", [("a", "b", 1)])
    rows = made({("a", 1): [1.0, 1.1], ("b", 1): [1.2, 1.3]})
    assert judge(study, rows, {"X"})[0].answer == "holds"
    rows[1]["validation"] = "other"
    with pytest.raises(UsageError, match="a, seed 2, and a, seed 1, were validated on different"):
        judge(study, rows, {"X"})


def test_a_claim_reads_and_prices_its_own_text():
    study = claims_of("not_worse", [("a", "b", 1)], margin=0.1)
    values = {("a", 1): [1.0, 1.3, 0.9], ("b", 1): [1.1, 1.1, 0.8]}
    other = [
        row | {"corpus": "u", "bits_per_byte": 9.0, "cpu_seconds": 1.0, "validation": "w"}
        for row in made({("a", 1): [1.0] * 4, ("b", 1): [1.0] * 4})
    ]
    alone = judged(study, values)
    (one,) = judge(study, [*made(values), *other], {"X"})
    assert one == alone and one.settling is not None


def test_order_holds_where_every_step_does():
    study = claims_of("ordered", [("a", "b", 1), ("b", "a", 2)])
    turns = {("a", 1): [1.0, 1.1, 1.2], ("b", 1): [1.1, 1.21, 1.3]}
    later = {("a", 2): [0.9, 0.8, 0.7], ("b", 2): [0.8, 0.71, 0.6]}
    one = judged(study, turns | later)
    assert one.answer == "holds" and one.estimate == pytest.approx(-0.29 / 3)
    same = judged(study, turns | {(a, 2): v for (a, _), v in turns.items()})
    assert same.answer == "refuted" and same.estimate == pytest.approx(0.31 / 3)


def test_a_slope_is_that_of_each_seed():
    contrasts = [("a", "b", n) for n in (1, 2, 3)]
    study = claims_of("slope", contrasts, x=(2.0, 3.0, 8.0))
    rng = np.random.default_rng(0)
    values = {(arm, n): list(rng.normal(0, 1, 4)) for n in (1, 2, 3) for arm in "ab"}
    one = judged(study, values)
    differences = np.array([np.subtract(values["a", n], values["b", n]) for n in (1, 2, 3)])
    slopes = np.polyfit([2.0, 3.0, 8.0], differences, 1)[0]
    assert one.estimate == pytest.approx(slopes.mean())
    assert one.ci == pytest.approx(t_interval(slopes))


def test_a_diverged_run_drops_its_pair_and_is_named():
    study = claims_of("not_worse", [("a", "b", 1)], margin=0.5, min_seeds=3)
    values = {("a", 1): [1.0, None, 1.1, 1.2], ("b", 1): [1.01, 1.0, 1.09, 1.2]}
    one = judged(study, values)
    assert (one.seeds, one.dropped, one.answer) == ([1, 3, 4], [2], "holds")
    whole = {name: series[:3] for name, series in values.items()}
    few = judged(study, whole)  # all three have run, and one diverged
    assert (few.answer, few.estimate, few.dropped) == ("cannot_tell", None, [2])
    missing = judged(study, {name: series[:2] for name, series in values.items()})
    assert (missing.answer, missing.estimate) == ("open", None)
    uncopied = claims_of("not_worse", [("a", "b", 1)], margin=0.5)
    uncopied = dataclasses.replace(
        uncopied, claims=(dataclasses.replace(uncopied.claims[0], metric="bits_per_byte_uncopied"),)
    )
    rows = [row | {"bits_per_byte_uncopied": row["bits_per_byte"]} for row in made(values)]
    rows[0]["bits_per_byte_uncopied"] = None  # measured before there was the metric
    one = judge(uncopied, rows, {"X"})[0]
    assert (one.seeds, one.dropped) == ([3, 4], [2])
    unpaired = judged(study, {("a", 1): [1.0, 1.0, 1.1], ("b", 1): [1.0]})
    assert (unpaired.answer, unpaired.seeds) == ("open", [1])


def test_the_page_counts_the_seeds_that_it_averages():
    rows = made({("a", 1): [1.0, None, 1.2]})
    for row in rows:
        row["scores"] = {} if row["bits_per_byte"] is None else {"wrong": row["bits_per_byte"] / 2}
    (row,) = _means(rows, scored=True)
    assert (row["seeds"], row["bits/byte"], row["CPU s of a run"]) == (2, "1.1000", "60")
    assert row["wrong"] == "0.55"
    (short,) = _means(rows, scored=False)
    assert short == {name: value for name, value in row.items() if name != "wrong"}


def test_what_cannot_be_told_says_what_would_settle_it():
    study = claims_of("not_worse", [("a", "b", 1)], margin=0.1)
    one = judged(study, {("a", 1): [1.0, 1.3, 0.9], ("b", 1): [1.1, 1.1, 0.8]})
    assert one.answer == "cannot_tell" and one.settling is not None
    seeds, minutes = one.settling
    assert seeds > 3 and minutes == seeds * 2.0
    assert one.prediction_hit is False
    exploratory = dataclasses.replace(one, registered=False)
    assert exploratory.to_dict()["registered"] is False


def test_a_rule_that_cannot_do_without_a_diverged_run_names_it():
    def gap(rows):
        a, b = (row["bits_per_byte"] for row in rows)
        return Said("holds" if a < b else "refuted", f"{a - b:+.2f}")

    arms = (Arm("a", Config()), Arm("b", Config()))
    series = Series("confirm", "t", Experiment(arms, (1,), Budget(steps=1)), (1,))
    study = Study("s", "", (series,), (), (Rule("R", "", "", "", gap),))

    def said(values):
        (one,) = judge_rules(study, made(values), {"R"})
        return one.said

    assert said({("a", 1): [1.0], ("b", 1): [1.5]}) == ("holds", "-0.50")
    assert said({("a", 1): [1.0]}) == ("open", "1 of 2 runs")
    diverged = said({("a", 1): [1.0], ("b", 1): [None]})
    assert diverged == ("cannot_tell", "These runs diverged: b (seed 1, t).")

    def best(rows):
        known = [row["bits_per_byte"] for row in rows if row["bits_per_byte"] is not None]
        return Said("holds", f"{min(known):.2f}")

    none = made({("a", 1): [None], ("b", 1): [None]})
    (one,) = judge_rules(
        dataclasses.replace(study, rules=(Rule("R", "", "", "", best),)), none, set()
    )
    assert one.said.answer == "cannot_tell" and "a (seed 1, t), b (seed 1, t)" in one.said.why
    broken = dataclasses.replace(study, rules=(Rule("R", "", "", "", lambda rows: rows[0]["no"]),))
    with pytest.raises(KeyError):
        judge_rules(broken, made({("a", 1): [1.0], ("b", 1): [1.5]}), set())
