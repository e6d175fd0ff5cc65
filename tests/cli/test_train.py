"""`headway train`: new runs and resumed ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.command import call, mistake


def test_a_run_is_not_overwritten_silently(run, place):
    recipe = f"{place}/tiny.py:tiny"
    assert "already holds a run" in mistake("train", recipe, "--run", run)


def test_derived_values_are_printed_once(place, tmp_path):
    """Those of the config and those of data and device, which run.json keeps."""
    args = ("--run", tmp_path / "run", "--steps", 1, "--model.moe.balance.bias", "sign")
    done = call("train", f"{place}/tiny.py:tiny", *args)
    derived = json.loads((tmp_path / "run" / "run.json").read_text())["derived"]
    assert {"model.d_head", "model.vocab_size", "run.eval_every"} <= set(derived)
    lines = done.out.splitlines()
    for name, sentence in derived.items():
        assert [line for line in lines if line.startswith(f"{name} = ")] == [f"{name} = {sentence}"]
    assert done.out.count("note: model.moe.balance.bias=sign and aux=0.01 both even out") == 1


def test_resume_of_a_finished_run_changes_nothing(run):
    before = (run / "checkpoints" / "step-000006" / "model.safetensors").read_bytes()
    done = call("train", "--resume", run, "--json")
    assert done.code == 0 and done.json["steps"] == 6
    assert (run / "checkpoints" / "step-000006" / "model.safetensors").read_bytes() == before


def test_resume_names_the_field_that_differs(run, place):
    assert "model.d_model is 16" in mistake("train", "--resume", run, "--model.d-model", 32)
    assert "optim.lr is 0.001" in mistake("train", "--resume", run, "--optim.lr", 1)
    assert "run.seed is 0" in mistake("train", "--resume", run, "--seed", 1)
    # its losses would be of two texts
    assert "run.eval_tokens is 128" in mistake("train", "--resume", run, "--run.eval-tokens", 0)
    assert "model.n_layers is 1 in" in mistake("train", "demo", "--resume", run)


def test_resume_may_go_on_longer(run, place):
    longer = place / "runs" / "longer"
    shutil.copytree(run, longer)
    done = call("train", f"{place}/tiny.py:tiny", "--resume", longer, "--steps", 8, "--json")
    assert done.code == 0 and done.json["steps"] == 8


def test_name_of_a_file_that_is_not_utf8(place, tmp_path):
    """It is trained on, resumed and reported, and printed where stdout takes nothing else."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text((place / "text.txt").read_text())
    run = tmp_path / "run"
    assert (
        call("train", f"{place}/tiny.py:tiny", "--data", path, "--run", run, "--steps", 1).code == 0
    )
    assert json.loads((run / "run.json").read_text())["config"]["data"]["source"] == [path]
    assert call("train", "--resume", run, "--steps", 2, "--json").json["steps"] == 2
    assert call("report", run).code == 0
    command = [sys.executable, "-m", "headway", "tokenize", "--shards", "--data", path]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0 and rb"caf\udce9.txt: 1 file" in done.stdout
