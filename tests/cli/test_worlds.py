"""`headway worlds`, training on a world, and `headway eval --suite worlds`."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.command import call, mistake

SPEC = "world:mqar,pairs=2,length=12,vocab=16"


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "run"
    done = call("train", f"{place}/tiny.py:tiny", "--data", SPEC, "--run", folder, "--json")
    assert done.code == 0, done
    return folder


def test_items_are_lines(tmp_path):
    file = tmp_path / "items.jsonl"
    words = ("worlds", "mqar,pairs=3,vocab=40", "--n", 7, "--length", 20, "--seed", 9)
    facts = call(*words, "--split", "test", "--out", file, "--json").json
    lines = file.read_text().splitlines()
    assert facts["n"] == len(lines) == 7
    assert facts["options"] == {"pairs": 3, "length": 20, "vocab": 40}
    for line in lines:
        item = json.loads(line)
        assert list(item) == ["prompt", "answer", "tokens", "targets", "meta"]
        assert len(item["tokens"]) == len(item["targets"]) == 20 and item["meta"] == {"pairs": 3}
    assert call(*words, "--split", "test").out.splitlines() == lines
    assert call(*words, "--split", "train").out.splitlines() != lines


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("a5,bos=0", {"length": 32, "bos": 0}),
        ("facts,weights=conflict,kind=holder", {"weights": "conflict", "kind": "holder"}),
    ],
)
def test_the_options_are_those_of_the_task(task, options, tmp_path):
    facts = call("worlds", task, "--n", 3, "--out", tmp_path / "items.jsonl", "--json").json
    assert facts["options"].items() >= options.items() and "group" not in facts["options"]


def test_a_reader_that_goes_away_is_no_mistake():
    words = (sys.executable, "-m", "headway", "worlds", "copy", "--n", "20000")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_train_and_eval(trained, place):
    facts = call("eval", trained, "--suite", "worlds", "--items", 50, "--json").json
    result = facts["worlds"][SPEC]
    assert result["items"] == 50 and result["targets"] == 100
    assert 0 <= result["exact"] <= result["accuracy"] <= 1
    assert set(result["floors"]) == {"most_frequent", "last_mentioned", "bag_of_words"}
    longer = SPEC.replace("12", "14")
    done = call("eval", trained, "--suite", "worlds", "--data", longer, "--items", 5)
    assert done.code == 0 and longer in done.out and "floors: most frequent" in done.out
    plain = call("eval", trained, "--json").json
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert plain["windows"] == 512 and plain["data"] == [SPEC]
    loss = [r["val_loss"] for r in records if "val_loss" in r][-1]
    assert loss == pytest.approx(plain["val_loss"], rel=0.2)  # on 8 windows of the 512


def test_a_resumed_run_ends_as_one_that_never_stopped(trained, place, tmp_path):
    words = (f"{place}/tiny.py:tiny", "--data", SPEC, "--run", tmp_path / "r")
    assert call("train", *words, "--checkpoint-every", 3).code == 0
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-000006")
    resumed = call("train", "--resume", tmp_path / "r", "--json").json
    assert resumed["steps"] == 6
    assert resumed["val_loss"] == call("train", "--resume", trained, "--json").json["val_loss"]


def test_mistakes(run, trained, place, tmp_path):
    assert "worlds needs a task; use mqar" in mistake("worlds")
    assert "there is no world 'hanoi'" in mistake("worlds", "hanoi")
    line = mistake("worlds", "mqar", "--length", 10)
    assert "needs an even length of at least 32, and length is 10" in line
    assert "--n 0 is too small" in mistake("worlds", "mqar", "--n", 0)
    assert "give --out FILE" in mistake("worlds", "mqar", "--json")
    assert "cannot write" in mistake("worlds", "mqar", "--out", tmp_path / "no" / "where")
    out = tmp_path / "items.jsonl"
    out.write_text("before")
    line = mistake("worlds", "copy,length=1", "--split", "val", "--out", out)
    assert "has no items for the val split" in line and out.read_text() == "before"
    line = mistake("worlds", "mqar,pairs=4,pairs=8")
    assert "world:mqar is given pairs=4 and pairs=8; use one" in line
    line = mistake("worlds", "copy,length=4", "--length", 8)
    assert "world:copy is given length=4 and length=8" in line
    line = mistake("eval", run, "--suite", "worlds")
    assert "is what" in line and "give --data world:TASK" in line
    assert "lacks words of world:mqar" in mistake(
        "eval", run, "--suite", "worlds", "--data", "world:mqar"
    )
    line = mistake("eval", run, "--data", SPEC)
    assert "is no text" in line and "--suite worlds" in line
    line = mistake("eval", trained, "--data", place / "text.txt")
    assert "trained on worlds" in line
    for items in (9, 512):  # also the one that is taken where nothing is said
        assert f"--items {items} is for --suite" in mistake("eval", trained, "--items", items)
    assert "--items 0" in mistake("eval", trained, "--suite", "worlds", "--items", 0)
    assert "leave out --tokens" in mistake("eval", trained, "--suite", "worlds", "--tokens", 9)
