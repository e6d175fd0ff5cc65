"""A run that goes on for more steps than it was planned for, and one that branches off before."""

import json
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headway.checkpoint import run_folder
from headway.config import UsageError
from headway.report.sinks import read_metrics
from tests.command import call, mistake
from tests.train import tiny_run
from tests.train.tiny_run import records, tiny, train


def told(lines):
    return [line for line in lines if line.startswith("resume: the schedule was")]


@pytest.fixture
def finished(tmp_path):
    """A `wsd` run of 20 steps that falls after step 14, with checkpoints every 4 steps."""
    train(tiny(tmp_path))
    return tmp_path / "run"


def test_what_a_finished_run_keeps(finished):
    """The newest two, and the last one before the fall."""
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["step-000012", "step-000016", "step-000020"]


def test_more_steps_are_told_and_stay_with_the_run(finished):
    done = call("train", "--resume", finished, "--steps", 24)
    line = told(done.out.splitlines())
    assert done.code == 0 and len(line) == 1
    assert line[0].startswith(
        "resume: the schedule was wsd over 20 steps and is wsd over 24 steps; the learning rate of "
        "step 20 was 0, that of step 21 is 0.00122: a jump from zero; to go on from before the fall: "
    )
    assert run_folder.read_config(finished).optim.steps == 24
    again = call("train", "--resume", finished, "--json")
    assert again.json["steps"] == 24 and told(again.out.splitlines()) == []


def test_an_interrupted_longer_run_goes_on_to_its_new_end(finished):
    """By the command that it prints, which names no steps; run.json keeps them."""
    lines = []

    def log(line):
        lines.append(line)
        if line.startswith("step 21/40"):
            signal.raise_signal(signal.SIGTERM)

    config = tiny(finished.parent, optim={"steps": 40})
    assert train(config, resume=finished, log=log)["interrupted"]
    assert len(told(lines)) == 1
    command = lines[-1].partition("go on with: headway ")[2]
    done = call(*shlex.split(command), "--json")
    assert done.json["steps"] == 40 and told(done.out.splitlines()) == []


def test_the_offer_is_the_run_that_was_longer_from_the_start(finished, tmp_path_factory):
    """Bit for bit: the schedule before the fall is the same."""
    line = told(call("train", "--resume", finished, "--steps", 24).out.splitlines())[0]
    command = line.partition("from before the fall: headway ")[2]
    longer = Path(f"{finished}-24")
    done = call(*shlex.split(command), "--json")
    assert done.code == 0 and done.json["steps"] == 24, done.err
    assert told(done.out.splitlines())[0].endswith("no jump")
    root = tmp_path_factory.mktemp("straight")
    straight = train(tiny(root, optim={"steps": 24}))
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(Path(r["checkpoint"]) / name) for r in (straight, done.json))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    after = [r for r in read_metrics(longer / "metrics.jsonl") if "event" not in r]
    comparable = [{k: v for k, v in r.items() if k not in tiny_run.WALL_CLOCK} for r in after]
    assert comparable == records(root)
    assert json.loads((longer / "run.json").read_text())["config"]["optim"]["steps"] == 24
    # the run that it came from is as it was
    assert run_folder.find_checkpoint(finished)[0].name == "step-000024"


def test_mistakes(finished):
    checkpoint = finished / "checkpoints" / "step-000012"
    text = mistake("train", "--resume", checkpoint)
    assert "is a checkpoint of" in text and "--run" in text
    assert "is a checkpoint of" in mistake(
        "train", "--resume", checkpoint, "--run", finished.parent / "run/../run"
    )
    for name, path in (
        ("state.json", checkpoint),
        ("manifest.json", checkpoint.with_name("step-1")),
    ):
        (path / name).unlink(missing_ok=True)
        text = mistake("train", "--resume", path, "--run", finished.parent / "new")
        assert f"{path.name} is damaged ({name} is missing)" in text
    assert not (finished.parent / "new").exists()


def test_the_offered_checkpoint_survives_another_resume(finished):
    """The offer is kept with the run's state: a second resume tells nothing and removes nothing."""
    assert call("train", "--resume", finished, "--steps", 22).code == 0
    assert call("train", "--resume", finished, "--steps", 34).code == 0
    assert (finished / "checkpoints" / "step-000012").is_dir()
    assert call("train", "--resume", finished, "--steps", 50).code == 0
    assert (finished / "checkpoints" / "step-000012").is_dir()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_is_not_forked_into_itself(finished, overwrite):
    """By whatever spelling of its folder: --overwrite would clear the checkpoint it starts from."""
    start = finished / "checkpoints" / "step-000012"
    config = tiny(finished.parent)
    odd = str(finished.parent / "elsewhere" / ".." / "run")
    config = replace(config, run=replace(config.run, dir=odd))
    with pytest.raises(UsageError, match=r"is a checkpoint of .*, which goes on from its newest"):
        train(config, resume=start, overwrite=overwrite)
    assert start.is_dir() and (finished / "metrics.jsonl").is_file()
