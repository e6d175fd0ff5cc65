"""Studies on worlds: they train and score, and their rules decide as they say."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.config import ModelConfig, MoEConfig, with_leaf
from headway.lab.rows import read_rows
from headway.lab.study import quick, tasks, train
from headway.lab.verdict import judge_rules
from headway.model import costs as model_costs
from headway.model.transformer import Transformer
from studies import half_life, multiplication, worlds

NUMBERS = Path(__file__).resolve().parents[2] / "docs" / "numbers" / "studies"
WORK = model_costs.Workload(seq_len=5)
DENSE = MoEConfig(kind="dense")
STUDIES = {module.STUDY.name: module for module in (worlds, multiplication, half_life)}


@pytest.mark.parametrize(
    ("name", "corpus", "arm"),
    [
        ("worlds", "facts", "2x32"),
        ("multiplication", "2x2", "looped"),
        ("multiplication", "2x2, scratch-pad", "dense"),
        ("half_life", "s3", "dense"),
        ("half_life", "recall", "dense"),
    ],
)
def test_a_quick_run_is_scored(name, corpus, arm, tmp_path, monkeypatch):
    monkeypatch.setattr("studies.world_arms.ITEMS", 32)
    monkeypatch.setattr(STUDIES[name], "ITEMS", 32, raising=False)
    small = quick(STUDIES[name].STUDY)
    if arm == "looped":  # half its layers would be one
        small = dataclasses.replace(small, series=tuple(map(two_layers, small.series)))
    todo = [task for task in tasks(small) if (task.corpus, task.arm) == (corpus, arm)][:1]
    rows = train(small, todo, tmp_path, tmp_path / "rows.json", log=lambda _: None)
    (row,) = rows
    assert row["scores"] and all(np.isfinite(value) for value in row["scores"].values())
    shares = [value for key, value in row["scores"].items() if "wrong" in key or "failed" in key]
    assert shares and all(0 <= value <= 1 for value in shares)
    # ten steps on a task with several words to choose from
    assert max(shares) > 0.3


def two_layers(series):
    arms = [
        dataclasses.replace(arm, config=with_leaf(arm.config, "model.n_layers", 2))
        for arm in series.experiment.arms
    ]
    experiment = dataclasses.replace(series.experiment, arms=tuple(arms))
    return dataclasses.replace(series, experiment=experiment)


def test_a_looped_model_is_read_as_it_was_trained():
    config = ModelConfig(vocab_size=16, n_layers=3, d_model=16, n_heads=2, moe=DENSE)
    edited, plain = Transformer(config, seed=1), Transformer(config, seed=1)
    multiplication.looped(edited)
    built = Transformer(config, seed=1, blocks=multiplication.LoopedBlocks())
    tokens_BS = torch.arange(10).view(2, 5)
    ours, read, other = (model(tokens_BS).logits_BSV for model in (edited, built, plain))
    assert torch.equal(ours, read) and not torch.equal(ours, other)
    n = {name.split(".")[1] for name, _ in edited.named_parameters() if name.startswith("layers")}
    assert n == {"0"}
    costs, single = (model_costs.costs_of(m, WORK) for m in (edited, plain))
    assert model_costs.total(costs, model_costs.flops) == model_costs.total(
        single, model_costs.flops
    )
    held = sum(p.numel() for p in edited.parameters())
    assert model_costs.total(costs, model_costs.active_parameters) == held


def test_the_weibull_fit_recovers_a_law():
    generator = np.random.default_rng(0)
    for shape, scale in ((1.0, 8.0), (2.0, 10.0), (0.6, 20.0)):
        place_B = np.ceil(scale * generator.weibull(shape, 40_000))
        alive_BT = place_B[:, None] > np.arange(1, 17)
        assert half_life.weibull(alive_BT) == pytest.approx((shape, scale), rel=0.05)


def row(corpus, arm, **scores):
    return {"corpus": corpus, "arm": arm, "scores": scores}


def test_rules_of_half_life():
    def chained(*pairs):
        return [row("s3", "dense", **{"Weibull shape K": k, "failed by 16": f}) for k, f in pairs]

    assert half_life.constant_hazard(chained((0.9, 0.5), (1.1, 0.4))).answer == "holds"
    assert half_life.constant_hazard(chained((2.0, 0.5), (1.5, 0.4))).answer == "refuted"
    # runs that hardly fail say nothing of a shape
    assert half_life.constant_hazard(chained((0.9, 0.01), (1.1, 0.4))).answer == "cannot_tell"
    later = [row("s3", "dense", **{"failed by 16": 0.5, "failed by 24": 1 - 0.5 * 0.8**8})]
    assert half_life.longer_fails(later) == ("holds", half_life.longer_fails(later).why)
    assert "20.0%" in half_life.longer_fails(later).why


def test_rules_of_multiplication():
    def items(name, wrong, arm="dense"):
        return row(name, arm, **{"items wrong": wrong})

    rows = [items("2x2", 0.9), items("2x2, last first", 0.7), items("2x2, scratch-pad", 0.1)]
    assert multiplication.steps_help(rows).answer == "holds"
    rows[1] = items("2x2, last first", 0.85)
    assert multiplication.steps_help(rows).answer == "cannot_tell"
    assert multiplication.sizes_help([rows[0], items("2x2", 0.85, "flat")]).answer == "holds"
    assert multiplication.sizes_help([rows[0], items("2x2", 0.7, "looped")]).answer == "refuted"
    digits = dict(zip(("first digit wrong", "last digit wrong"), (0.2, 0.1), strict=True))
    for middle, answer in ((0.5, "holds"), (0.15, "refuted")):
        one = row("2x2", "dense", **digits, **{"worst middle digit wrong": middle})
        assert multiplication.middle_first([one]).answer == answer


def test_rules_of_worlds():
    def runs(corpus, arm, *wrong):
        return [row(corpus, arm, **{"targets wrong": x, "items wrong": x}) for x in wrong]

    good, bad = (0.01, 0.02), (0.3, 0.01)
    recall = runs("recall", "dense", *good)
    assert worlds.positions(recall + runs("recall", worlds.NORMED, 0.3, 0.3)).answer == "holds"
    assert worlds.positions(recall + runs("recall", worlds.NORMED, *bad)).answer == "cannot_tell"
    assert worlds.positions(recall + runs("recall", worlds.NORMED, *good)).answer == "refuted"
    rows = [x for w in worlds.WORLDS for d in worlds.DESIGNS for x in runs(w, d, *good)]
    # a run that is not there yet has not failed
    (one,) = runs("s5", "flat", 0.01)
    one["scores"]["floor"] = 0.9
    assert worlds.by_world([one])[0]["solved"] == "1 of 1"
    assert worlds.sparse_solves(rows).answer == "holds"
    assert worlds.no_design(rows).answer == "refuted"


def test_a_run_that_diverged_is_not_scored():
    """Neither as unsolved nor as all wrong: a rule that reads it cannot tell, a table has others."""
    for study in (worlds.STUDY, multiplication.STUDY, half_life.STUDY):
        known = read_rows(NUMBERS / f"{study.name}.json")
        for rule in study.rules:
            rows = [row for row in known if row["corpus"] in rule.corpora or not rule.corpora]
            (before,) = (j.said for j in judge_rules(study, known, set()) if j.rule is rule)
            assert before == rule.judge(rows)
            lost = next(row for row in rows if row["arm"] in ("dense", "flat"))
            rest = [row for row in known if row is not lost]
            diverged = [*rest, lost | {"bits_per_byte": None, "scores": {}}]
            (said,) = (j.said for j in judge_rules(study, diverged, set()) if j.rule is rule)
            named = f"{lost['arm']} (seed {lost['seed']}, {lost['corpus']})"
            assert said == ("cannot_tell", f"These runs diverged: {named}."), rule.id
            if study is worlds.STUDY:
                assert worlds.by_world(diverged) == worlds.by_world(rest) != worlds.by_world(known)
