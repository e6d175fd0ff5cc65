"""Runs are ranked on the same validation text only."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from headway.report.html import load_runs, render
from headway.report.ranking import ranking
from tests.report.fake_run import make_run
from tests.report.test_html import embedded

COMPARE = Path(__file__).parents[2] / ".agents" / "skills" / "compare-runs" / "compare.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranked")
    folders = {
        name: make_run(root / name, steps=40, layers=1, floor=floor, text=text)
        for name, floor, text in (
            ("worse", 1.9, "aaaa"),
            ("better", 1.5, "aaaa"),
            ("elsewhere", 1.4, "bbbb"),
        )
    }
    folders["old"] = make_run(root / "old", steps=40, layers=1)
    info = json.loads((folders["old"] / "run.json").read_text())
    del info["validation"]
    (folders["old"] / "run.json").write_text(json.dumps(info))
    folders["young"] = make_run(root / "young", steps=40, layers=1, text="aaaa")
    (folders["young"] / "metrics.jsonl").write_text("")
    return folders


def ranked(folders, *names):
    return ranking(load_runs([folders[name] for name in names]))


def test_best_first_on_one_text(folders):
    answer = ranked(folders, "worse", "better")
    assert answer.order == ["better", "worse"]
    head = [r["headline"]["val_last"] for r in load_runs([folders["better"], folders["worse"]])]
    assert answer.sentence == (
        "Ranked by validation bits/byte on 128 of 3,022 windows of 256 tokens of stdlib: "
        f"better {head[0]:.4f}, worse {head[1]:.4f}"
    )
    assert ranked(folders, "better") == (None, "")


def test_different_text_is_refused_and_named(folders):
    answer = ranked(folders, "worse", "elsewhere", "better")
    assert answer.order is None and "\n" not in answer.sentence
    assert answer.sentence.startswith(
        "Not ranked: they were validated on different text: worse, be"
    )
    assert "(text aaaa); elsewhere on 128 of" in answer.sentence
    assert "run.eval_tokens=0" in answer.sentence
    page = render(load_runs([folders["worse"], folders["elsewhere"]]))
    assert embedded(page)["ranking"].startswith("Not ranked: they were validated on different")


def test_a_leak_is_said_beside_the_rank(folders, tmp_path):
    leaking = make_run(tmp_path / "leaking", steps=40, layers=1, floor=1.1, text="aaaa")
    info = json.loads((leaking / "run.json").read_text())
    info["overlap"] = {"shared": 10, "validation_documents": 10, "sentence": "10 of 10 are"}
    (leaking / "run.json").write_text(json.dumps(info))
    answer = ranking(load_runs([folders["better"], leaking]))
    assert answer.order == ["leaking", "better"]
    said = "; of leaking, 10 of 10 validation documents are trained on"
    assert answer.sentence.endswith(said)


def test_unknown_text_and_missing_evaluations_are_refused(folders):
    answer = ranked(folders, "worse", "old")
    assert answer.order is None and "run.json of old does not say" in answer.sentence
    answer = ranked(folders, "worse", "young")
    assert answer.order is None and "young has no evaluation yet" in answer.sentence


@pytest.mark.parametrize(
    "names, code", [("worse better", 0), ("better worse", 1), ("worse elsewhere", 1)]
)
def test_the_skill_compares_on_one_text_only(folders, names, code, monkeypatch, capsys):
    paths = [str(folders[name]) for name in names.split()]
    monkeypatch.setattr(sys, "argv", ["compare.py", *paths])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(COMPARE), run_name="__main__")
    assert end.value.code == code
    shown = capsys.readouterr()
    assert ("different text" in shown.err) == ("elsewhere" in names)
    assert ("difference" in shown.out) == ("elsewhere" not in names)
