"""Mixtures of languages: who is trained on what, what is scored, and what the rules make of it."""

import pytest
import torch

from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.lab.study import quick, tasks, train
from studies import coverage as study
from studies import mixed_languages as mixed


@pytest.mark.parametrize("corpus", ["order (a)", "help (en-gb)"])
def test_a_quick_run_is_scored(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed, "PROBLEMS", 2)
    small = quick(study.STUDY)
    todo = [task for task in tasks(small) if task.corpus == corpus][:1]
    (row,) = train(small, todo, tmp_path, tmp_path / "rows.json", log=lambda _: None)
    scores = row["scores"]
    if corpus != "order (a)":
        assert list(scores) == ["bits/byte, stdlib"] and 2 < scores["bits/byte, stdlib"] < 9
        return
    assert len(scores) == 3 * len(mixed.SHARES) + 1
    # ten steps teach no sum, and nobody guesses five digits half of the time
    assert all(scores[f"cover@0.5, {share}"] == 0 for share in mixed.SHARES)
    assert all(0 <= scores[f"pass@256, {share}"] <= 1 for share in mixed.SHARES)


def test_a_language_has_its_share_and_one_has_none():
    config = mixed.sums("own", 2)
    stream = Stream(prepare(config.data, load_tokenizer(config.data.vocabulary)), config.data, 0)
    letter = 7  # words of a language
    language = torch.cat([stream.batch(step).tokens_BS[:, 0] for step in range(40)]) // letter
    counts = language.bincount(minlength=5).tolist()
    by_share = {share: counts[i] for share, i in mixed.by_share(2).items()}
    for share, part in mixed.SHARES.items():
        assert abs(by_share[share] - part * len(language)) <= 2
    assert counts[1] == 0 == by_share["0%"] and len(config.data.source) == 4


def test_the_rules_of_sums():
    def one(unseen=0.0, little=0.0, one=1.0, most=1.0, covered=0.0):
        return [
            {
                "pass@256, 0%": unseen, "pass@256 in any, 0%": 0.1, "pass@256, 0.1%": little,
                "pass@256, 1%": one, "pass@256, 10%": 1.0, "pass@256, 88.9%": most,
                "cover@0.5, 1%": 0.5, "cover@0.5, 0.1%": covered,
            }
        ]  # fmt: skip

    def rows(*many):
        return [{"corpus": "x", "scores": scores} for group in many for scores in group]

    assert study.unseen(rows(one(), one())).answer == "holds"
    assert study.unseen(rows(one(0.2), one())).answer == "cannot_tell"
    assert study.unseen(rows(one(0.2), one(0.02))).answer == "refuted"
    assert study.one_percent(rows(one(one=0.95), one())).answer == "holds"
    assert study.one_percent(rows(one(one=0.4), one())).answer == "cannot_tell"
    assert study.one_percent(rows(one(one=0.4), one(one=0.1))).answer == "refuted"
    # nothing is said of a share where nothing was learned
    assert study.one_percent(rows(one(one=0.1, most=0.5))).answer == "cannot_tell"
    assert pytest.approx(256 / 5**5, rel=0.05) == study.GUESS
    assert study.guessing(rows(one(little=0.06))).answer == "holds"
    assert study.guessing(rows(one(little=0.06, covered=0.1))).answer == "cannot_tell"
    assert study.guessing(rows(one(little=0.01))).answer == "refuted"


def help_rows(bits):
    """Rows in which a language of a share has so many bits per byte."""
    rows = []
    for first, corpus in enumerate(mixed.PAGES):
        by_share = mixed.by_share(first)
        scores = {f"bits/byte, {mixed.HELP[i]}": bits[share] for share, i in by_share.items()}
        rows.append({"corpus": corpus, "scores": scores})
    return rows


def test_the_rules_of_help():
    bits = {"0%": 5.0, "0.1%": 4.5, "1%": 3.4, "10%": 2.5, "88.9%": 2.0}
    rows = help_rows(bits)
    table = mixed.by_language(rows)
    assert table == [{"language": language, **bits} for language in mixed.HELP]
    assert study.falls(rows).answer == study.half(rows).answer == "holds"
    # one language out of order, or short of the way
    rows[0]["scores"][f"bits/byte, {mixed.HELP[2]}"] = 4.6  # that with 1%
    assert study.falls(rows).answer == study.half(rows).answer == "cannot_tell"
    worse = help_rows({**bits, "1%": 4.6})
    assert study.falls(worse).answer == study.half(worse).answer == "refuted"
    assert mixed.by_language([]) == []
