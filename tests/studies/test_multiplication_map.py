"""Products of all sizes: what is wrong of each, and what rules and the picture make of it."""

from statistics import mean

import numpy as np
import pytest

from headway.lab.study import quick, tasks, train
from studies import multiplication_map as study
from studies import products

FORMS = study.COLUMNS


@pytest.mark.parametrize(("corpus", "arm"), [("scratch-pad", "flat"), ("direct", "looped, dense")])
def test_a_quick_run_is_scored(corpus, arm, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "ITEMS", 16)
    small = quick(study.STUDY)
    todo = [task for task in tasks(small) if (task.corpus, task.arm) == (corpus, arm)][:1]
    (row,) = train(small, todo, tmp_path, tmp_path / "rows.json", log=lambda _: None)
    scores = row["scores"]
    assert len(scores) == 16 + 3 * 3 and all(0 <= share <= 1 for share in scores.values())
    # ten steps teach no product of three digits
    assert scores["3x3 wrong"] > 0.9 and products.of_all(scores) > 0.6


def test_a_right_model_has_nothing_wrong_and_one_wrong_digit_is_where_it_is(monkeypatch):
    """With the oracle in place of a model, and with one whose last digit is one off."""
    (arm,) = (a for a in study.STUDY.series[1].experiment.arms if a.name == "dense")
    wrong = {}
    for off in (0, 1):
        monkeypatch.setattr(products, "load_model", lambda *_, off=off, **__: oracle(arm, off))
        monkeypatch.setattr(products, "tensor_names", lambda _: ["layers.1.x"])
        wrong[off] = products.scores("a folder")
    assert set(wrong[0].values()) == {0.0}
    assert products.of_all(wrong[1]) == 1
    # the last digit is written first
    places = [wrong[1][f"4x4 wrong, {place}"] for place in products.PLACES]
    assert places == [0.0, 0.0, 1.0]


def oracle(arm, off):
    """A model that writes the last digit (which comes first) `off` too high, and all else right."""
    from types import SimpleNamespace

    import torch

    from headway.data.shards import prepare
    from headway.data.tokenizer import load_tokenizer

    data = arm.config.data
    tokenizer = load_tokenizer(data.vocabulary)
    worlds = prepare(data, tokenizer).sources
    by_tokens = {}
    for source in worlds:
        rows = source.rows(
            "test", np.arange(products.ITEMS, dtype=np.uint64), source.world.n_tokens
        )
        targets_BT = rows.targets_BS.copy()
        first_B = (targets_BT >= 0).argmax(1)
        at = np.arange(len(targets_BT)), first_B
        targets_BT[at] = (targets_BT[at] - source.id_V[0] + off) % 10 + source.id_V[0]
        by_tokens[rows.tokens_BS.tobytes()] = targets_BT

    def model(tokens_BT):
        targets_BT = torch.from_numpy(by_tokens[tokens_BT.numpy().tobytes()])
        logits = torch.nn.functional.one_hot(targets_BT.clamp(min=0), tokenizer.vocab_size).float()
        return SimpleNamespace(logits_BSV=logits)

    return SimpleNamespace(model=model, tokenizer=tokenizer, config=arm.config)


def rows(wrong, noise=(0.0, 0.01, -0.01)):
    """Rows of three seeds: (form, design) → the share wrong at all sizes."""
    made = []
    for (form, design), share in wrong.items():
        looped = form == "looped"
        for seed, more in enumerate(noise):
            scores = {f"{m}x{n} wrong": share + more for m in range(1, 5) for n in range(1, 5)}
            scores |= {f"{n}x{n} wrong, {p}": share for n in (2, 3, 4) for p in products.PLACES}
            arm = f"looped, {design}" if looped else design
            made.append(
                {"corpus": "direct" if looped else form, "arm": arm, "seed": seed, "scores": scores}
            )
    return made


def judged(made):
    return {rule.id: rule.judge(made).answer for rule in study.STUDY.rules}


def test_the_rules():
    base = {(form, design): 0.95 for form in FORMS for design in study.DESIGNS}
    pad = {("scratch-pad", design): 0.2 for design in study.DESIGNS}
    assert judged(rows(base | pad)) == {
        "direct": "holds",
        "middle": "refuted",  # all places alike
        "scratch-pad": "holds",
        "last first": "refuted",
        "sparsity": "holds",
        "looped": "holds",
    }
    better = rows(base | pad | {("last first", "flat"): 0.8, ("looped", "flat"): 0.5})
    assert judged(better)["sparsity"] == judged(better)["looped"] == "refuted"
    # a gain whose interval holds the margin decides nothing
    unsure = [
        r | {"scores": {k: v - 0.05 - 0.06 * (r["seed"] - 1) for k, v in r["scores"].items()}}
        if r["corpus"] == "last first" and r["arm"] == "flat"
        else r
        for r in rows(base | pad)
    ]
    assert judged(unsure)["sparsity"] == "cannot_tell"
    middle = rows(base | pad)
    for row in middle:
        row["scores"] |= {f"{n}x{n} wrong, worst middle digit": 0.99 for n in (2, 3, 4)}
    assert judged(middle)["middle"] == "holds"


def test_the_picture_shows_means_over_seeds():
    made = rows({("direct", "dense"): 0.5, ("looped", "flat"): 0.25}, noise=(0.0, 0.2))
    picture = study.picture(made)
    assert picture.count("<rect") == 32
    assert f"direct, 1 × 1: {mean((0.5, 0.7)):.1%}" in picture and "looped, 4 × 4: 35.0%" in picture
    assert study.picture([]) == ""
