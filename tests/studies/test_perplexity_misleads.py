"""Strings longer than those of training, and what the rules make of rows by hand."""

import dataclasses

import numpy as np
import pytest

from headway.config import OptimConfig, RunConfig
from headway.hub.load import load_model
from headway.train.loop import train
from studies import perplexity_misleads as study
from studies.long_strings import copying, losses, parity, scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = study.config("copy", "")
    run = RunConfig(dir=str(tmp_path_factory.mktemp("copy") / "run"), sample_tokens=0, threads=1)
    model = dataclasses.replace(config.model, n_layers=1, d_model=16, d_ff=16)
    config = dataclasses.replace(config, model=model, optim=OptimConfig(steps=2), run=run)
    train(config, log=lambda _: None)
    return run.dir


def test_scores_are_those_of_the_logits(folder):
    loaded = load_model(folder, "cpu", "float32", 1)
    said = copying(loaded, 5)
    zero, one, bar = (int(i) for i in loaded.tokenizer.encode("0 1 |"))
    tokens = np.array([[zero] * 5 + [bar] + [zero] * 4])
    targets = np.array([[-1] * 5 + [zero] * 5])
    nats, right = losses(loaded, tokens, targets)
    assert nats.shape == (1, 5) and said["nats, right, 5"] == pytest.approx(nats.mean())
    assert said["exact, right, 5"] == float(right.all())
    assert said["largest, wrong, 5"] >= said["nats, wrong, 5"] > 0
    assert one != zero and parity(loaded, 8)["accuracy, 8"] <= 1
    assert len(scores(folder)) == 18


def of_copies(gaps, exact):
    return [
        {"scores": {
            f"{what}, {side}, {n}": value
            for n, gap in zip(study.LENGTHS, gaps, strict=True)
            for side, more in (("right", 0.0), ("wrong", gap))
            for what, value in (("nats", 0.01 + more), ("largest", 1 + more),
                                ("exact", 1.0 if side == "right" else exact))
        }}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gaps", "exact", "answer"),
    [
        ((0.5, 0.1, 0.02), 0.0, "holds"),
        ((0.5, 0.4, 0.3), 0.0, "refuted"),
        ((0.5, 0.1, 0.02), 0.5, "refuted"),
    ],
)
def test_the_rule_of_copies(gaps, exact, answer):
    assert study.judge_copy(of_copies(gaps, exact)).answer == answer


def of_checkpoints(inside, outside, tail):
    return [
        {"seed": seed, "scores": {
            "accuracy, 16": a, "nats, 16": a * inside, "accuracy, 64": a, "nats, 64": a * outside,
            "tail, 64": a * tail + (a == 0.9) * 0.01,
        }}
        for seed in (1, 2) for a in (0.5, 0.6, 0.9)
    ]  # fmt: skip


def test_the_rules_of_checkpoints():
    rows = of_checkpoints(-1, 1, -2)
    assert study.judge_parity(rows).answer == "holds" and "-1.00" in study.judge_parity(rows).why
    assert study.judge_tail(rows).answer == "holds"
    rows = of_checkpoints(-1, -1, 2)
    assert study.judge_parity(rows).answer == study.judge_tail(rows).answer == "refuted"
