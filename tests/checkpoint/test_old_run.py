"""A run folder and a checkpoint that an earlier version wrote are read by this one.

`old_run` is a 4-step run of commit e2626d0 (float32, one thread) that was killed after step 3; its
checkpoint is of step 2. The numbers below are what that version gave.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from headway.hub.load import load_model
from tests.command import call

OLD_RUN = Path(__file__).parent / "old_run"


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A copy in the current folder, beside its data."""
    shutil.copytree(OLD_RUN, tmp_path / "old_run")
    os.replace(tmp_path / "old_run" / "text.txt", tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return "old_run"


def test_sample(old_run):
    greedy = call(
        "sample", old_run, "--prompt", "the ", "--tokens", 24, "--temperature", 0, "--json"
    )
    assert greedy.json["text"] == "\nhsss\n\n\n\n\ns\n\n\n\n\n\ufffd\ufffd\n\nS\ufffd\ufffd\n"


def test_eval(old_run):
    result = call("eval", old_run, "--data", "text.txt", "--json").json
    assert result["val_bits_per_byte"] == pytest.approx(8.226394701403557, rel=1e-6)
    assert result["windows"] == 6 and result["validation"] == "a8683f11ce4530a4"


def test_resume(old_run):
    result = call("train", "--resume", old_run, "--json").json
    assert result["steps"] == 4 and result["sample"].startswith("u")
    lines = [json.loads(line) for line in Path(old_run, "metrics.jsonl").read_text().splitlines()]
    values = {
        (r["step"], key): r[key]
        for r in lines
        for key in ("loss", "grad_norm", "val_loss")
        if key in r
    }
    assert values == pytest.approx(
        {
            (0, "val_loss"): 5.763011818160554,
            (1, "loss"): 5.794456958770752,
            (1, "grad_norm"): 2.020989307123065,
            (2, "loss"): 5.747433185577393,
            (2, "grad_norm"): 2.957699723090702,
            (2, "val_loss"): 5.667957968340662,
            (3, "loss"): 5.680656433105469,
            (3, "grad_norm"): 1.367623724853916,
            (4, "loss"): 5.627829551696777,
            (4, "grad_norm"): 1.4693915019457513,
            (4, "val_loss"): 5.622111246257485,
        },
        rel=1e-5,
    )


def test_a_single_checkpoint_folder(old_run):
    trained = load_model(Path(old_run) / "checkpoints" / "step-000002")
    assert trained.info.source.name == "step-000002" and trained.config.optim.steps == 4
    assert float(trained.model.embed.weight.detach().norm()) == pytest.approx(
        1.4238446950912476, rel=1e-6
    )
