"""A run that was interrupted, killed or damaged ends with the bits of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headway.checkpoint import run_folder
from headway.config import UsageError
from headway.train import loop
from tests.train import tiny_run
from tests.train.tiny_run import assert_same_run, events, tiny, train


@pytest.mark.parametrize("at", [2, 7, 11])
def test_interrupted_and_resumed_is_the_same_run(whole, tmp_path, monkeypatch, at):
    inner = loop.gradient
    calls = []

    def interrupting(*arguments, **options):
        calls.append(None)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return inner(*arguments, **options)

    monkeypatch.setattr(loop, "gradient", interrupting)
    lines = []
    stopped = train(tiny(tmp_path), log=lines.append)
    assert stopped["interrupted"] and stopped["steps"] == at and stopped["error"] == ""
    assert f"go on with: headway train --resume {tmp_path / 'run'}" in lines[-1]
    assert events(tmp_path) == [(at, "interrupted")]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.manual_seed(1234)  # whatever the new process did before
    resumed = train(run_folder.read_config(tmp_path / "run"), resume=tmp_path / "run")
    assert events(tmp_path) == [(at, "interrupted"), (at, "resumed")]
    assert_same_run(*(whole[0], tmp_path), whole[1], resumed)


def test_a_run_does_not_change_its_dtype_with_the_machine(tmp_path):
    """`auto` is what the machine multiplies natively, and run.json says what it was."""
    train(tiny(tmp_path, run={"dtype": "auto"}, optim={"steps": 4}))
    info = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    here = info["derived"]["run.dtype"].partition(":")[0]
    other = "float32" if here == "bfloat16" else "bfloat16"
    info["derived"]["run.dtype"] = f"{other}: that cpu had others"
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    saved = run_folder.read_config(tmp_path / "run")
    saved = replace(saved, optim=replace(saved.optim, steps=6))
    with pytest.raises(
        UsageError, match=f"auto was {other} where .* and is {here} on this machine"
    ):
        train(saved, resume=tmp_path / "run")
    chosen = replace(saved, run=replace(saved.run, dtype=here))
    assert train(chosen, resume=tmp_path / "run")["steps"] == 6


def test_a_second_interrupt_ends_at_once(tmp_path, monkeypatch):
    def twice(*_, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(loop, "gradient", twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path))


@pytest.mark.parametrize("how", ["sync", "async"])
def test_killed_at_random_moments_is_the_same_run(whole, tmp_path, how):
    """SIGKILL a training process three times, wherever it is, and let the fourth one finish."""
    drawn = random.Random(1)
    root = tmp_path / "killed"
    root.mkdir()
    command = [sys.executable, tiny_run.__file__, str(root)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    for _ in range(3):
        mode = "resume" if (root / "run" / "run.json").exists() else "new"
        with subprocess.Popen(
            [*command, mode, how], env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            started = next((line for line in process.stdout if line.startswith("path:")), None)
            assert started is not None
            # after some lines, so that a fast machine has not finished, and anywhere behind the last
            for _ in range(drawn.randint(0, 2)):
                process.stdout.readline()
            time.sleep(drawn.uniform(0.0, 0.02))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    result = train(run_folder.read_config(root / "run"), resume=root / "run")
    assert_same_run(whole[0], root, whole[1], result)


def test_resuming_without_any_checkpoint_starts_over(whole, tmp_path):
    config = tiny(tmp_path, run={"checkpoint_every": 20})
    with pytest.raises(ZeroDivisionError):
        train(config, log=lambda line: 1 / (not line.startswith("step 12/20")))
    lines = []
    result = train(config, resume=tmp_path / "run", log=lines.append)
    assert any("has no checkpoint yet; starting over at step 0" in line for line in lines)
    assert_same_run(whole[0], tmp_path, whole[1], result)


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(whole, tmp_path):
    config = tiny(tmp_path)
    first = train(config)
    os.truncate(Path(first["checkpoint"]) / "model.safetensors", 1000)
    lines = []
    result = train(config, resume=tmp_path / "run", log=lines.append)
    assert any("step-000020 is damaged (model.safetensors has 1000 bytes" in line for line in lines)
    assert events(tmp_path) == [(16, "resumed")]
    assert_same_run(whole[0], tmp_path, whole[1], result)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(UsageError, match="no whole checkpoint: .*manifest.json is missing"):
        train(config, resume=tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    config = tiny(tmp_path)
    train(config)
    result = train(config, resume=tmp_path / "run")
    assert_same_run(whole[0], tmp_path, whole[1], result)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": {"d_model": 64}}, "model.d_model is 32 in the checkpoint and 64 in the recipe"),
        ({"run": {"seed": 5}}, "seed is 0 in the checkpoint and 5 now"),
        ({"data": {"val_fraction": 0.2}}, "data is .* in the checkpoint and .* now"),
        ({"optim": {"name": "muon"}}, "resume with the same optim.name"),
    ],
)
def test_resuming_something_else_is_refused(tmp_path, change, words):
    train(tiny(tmp_path, optim={"steps": 4}))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=words):
        train(tiny(tmp_path, **change), resume=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UsageError, match="holds no run.json"):
        train(tiny(tmp_path), resume=tmp_path / "nothing")
