"""The loop on a tiny model: golden losses, skipping, stopping, failing well."""

import dataclasses
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from headway.checkpoint import checkpoint_dir, run_folder, save
from headway.checkpoint.checkpoint_dir import CheckpointError
from headway.config import RouterConfig, RunError, UsageError
from headway.report.runs import load_run
from headway.report.sinks import read_metrics
from headway.train import loop
from tests.train.tiny_run import assert_same_run, events, quiet, records, tiny, train

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"


def test_golden_losses(tmp_path):
    config = tiny(tmp_path, run={"log_every": 1, "checkpoint_every": 0, "threads": 1})
    # Without noise, whose normal numbers differ in their last bit between kinds of processors.
    plain = dataclasses.replace(config.model.moe, router=RouterConfig())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=plain))
    train(config)
    losses = [r["loss"] for r in records(tmp_path) if "loss" in r]
    again = dataclasses.replace(
        config, run=dataclasses.replace(config.run, dir=str(tmp_path / "2"))
    )
    train(again)
    second = [r["loss"] for r in read_metrics(tmp_path / "2" / "metrics.jsonl") if "loss" in r]
    assert losses == second  # bit for bit
    if os.environ.get("HEADWAY_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-6)
    assert losses[-1] < losses[0] - 1


def test_result_and_run_folder(whole):
    root, result = whole
    assert result["steps"] == 20 and result["tokens"] == 20 * 4 * 32 and result["skipped"] == 0
    assert result["val_bits_per_byte"] < result["first_val_bits_per_byte"] - 1
    assert not result["interrupted"] and result["error"] == "" and result["stopped"] == ""
    assert Path(result["report"]).is_file()
    assert checkpoint_dir.verify(Path(result["checkpoint"])) == ""
    written = records(root)
    assert [r["step"] for r in written if "loss" in r] == [3, 6, 9, 12, 15, 18, 20]
    assert [r["step"] for r in written if "val_loss" in r] == [0, 5, 10, 15, 20]
    assert [r["step"] for r in written if "sample" in r] == [10, 20]
    interval = next(r for r in written if "loss" in r)
    assert torch.tensor(interval["load"]).shape == (2, 2, 4)
    assert torch.tensor(interval["load"]).mean(-1).flatten().tolist() == pytest.approx(
        [1.0] * 4, abs=1e-3
    )
    assert len(interval["entropy"]) == 2 and all(0 < e <= 1 for e in interval["entropy"])
    info = json.loads((root / "run" / "run.json").read_text())
    assert info["parameters"] == {
        "total": result["parameters_total"],
        "active": result["parameters_active"],
    }
    assert info["derived"]["model.vocab_size"].startswith("320: ")
    assert run_folder.read_config(root / "run").model.vocab_size == 320


def test_weights_that_have_diverged_end_a_run_that_shows_samples(tmp_path):
    config = tiny(tmp_path, optim={"steps": 4, "lr": 1e30}, run={"eval_every": 4})
    with pytest.raises(RunError, match="step 4: the validation loss is nan, .* lower optim.lr"):
        loop.train(config, log=quiet)
    assert events(tmp_path)[-1] == (4, "stopped")


def _spoil(monkeypatch, at, **values):
    """Replaces what steps `at` (from 1) measured; returns the weights before each step."""
    inner, weights = loop.gradient, []

    def spoiled(model, *rest, **options):
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        result = inner(model, *rest, **options)
        return dataclasses.replace(result, **values) if len(weights) in at else result

    monkeypatch.setattr(loop, "gradient", spoiled)
    return weights


@pytest.mark.parametrize(
    "values, detail",
    [
        ({"loss_sum": float("nan")}, "loss nan"),
        ({"norm": float("inf")}, "gradient norm inf"),
        ({"balance": float("nan")}, "loss"),
    ],
)
def test_a_non_finite_step_is_skipped_and_counted(tmp_path, monkeypatch, values, detail):
    weights = _spoil(monkeypatch, {6, 7}, **values)
    result = train(tiny(tmp_path, optim={"steps": 10}))
    assert result["skipped"] == 2 and result["steps"] == 10
    same = [
        all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(weights, weights[1:], strict=False)
    ]
    assert same == [False] * 5 + [True, True] + [False] * 2
    written = read_metrics(tmp_path / "run" / "metrics.jsonl")
    skips = [(r["step"], r["detail"].startswith(detail)) for r in written if "event" in r]
    assert skips == [(6, True), (7, True)]
    intervals = [r for r in written if "loss" in r]
    assert [(r["step"], r["skipped"]) for r in intervals] == [(3, 0), (6, 1), (9, 2), (10, 2)]
    assert all(r["loss"] is not None and r["grad_norm"] is not None for r in intervals)
    state = json.loads((Path(result["checkpoint"]) / "state.json").read_text())
    assert state["updates"] == 8


def test_a_loss_spike_is_skipped(tmp_path, monkeypatch):
    _spoil(monkeypatch, {25}, loss_sum=1e6)
    result = train(tiny(tmp_path, optim={"steps": 27, "spike": 5.0}))
    assert result["skipped"] == 1 and events(tmp_path) == [(25, "skipped")]


def test_too_many_skipped_steps_fail_the_run(tmp_path, monkeypatch):
    _spoil(monkeypatch, set(range(5, 100)), loss_sum=float("nan"))
    with pytest.raises(
        RunError, match="3 steps in a row were skipped, the last at step 7: loss nan"
    ):
        train(tiny(tmp_path, optim={"max_skipped": 3}))
    assert events(tmp_path) == [(5, "skipped"), (6, "skipped"), (7, "skipped"), (7, "stopped")]
    assert (tmp_path / "run" / "report.html").is_file()


def test_stops_early_on_request(tmp_path):
    result = train(tiny(tmp_path, run={"stop_bits_per_byte": 6.5}))
    assert result["steps"] in (5, 10, 15) and result["val_bits_per_byte"] <= 6.5
    assert "reach run.stop_bits_per_byte=6.5" in result["stopped"]
    assert events(tmp_path) == [(result["steps"], "stopped")]
    assert Path(result["checkpoint"]).name == f"step-{result['steps']:06d}"
    other = tmp_path / "other"
    timed = train(tiny(other, run={"max_seconds": 1e-3}))
    assert timed["steps"] == 1 and "run.max_seconds=0.001" in timed["stopped"]
    assert [r["step"] for r in records(other) if "val_loss" in r] == [0, 1]


def test_a_failing_checkpoint_does_not_end_the_run(tmp_path, monkeypatch):
    inner = save.write_checkpoint

    def failing(plan):
        if plan.step in (8, 20):
            raise CheckpointError(f"checkpoint at step {plan.step} was not written: no space")
        return inner(plan)

    monkeypatch.setattr(save, "write_checkpoint", failing)
    lines = []
    result = train(tiny(tmp_path), log=lines.append)
    assert result["steps"] == 20 and result["error"].startswith("checkpoint at step 20 was not")
    assert Path(result["checkpoint"]).name == "step-000016"
    assert events(tmp_path) == [(8, "checkpoint failed"), (20, "checkpoint failed")]
    assert any(
        "step 8 was not written" in line and "step-000004 is the last" in line for line in lines
    )


def test_checkpoints_beside_training(whole, tmp_path, monkeypatch):
    """Slow ones and a failing one: the same run, and what failed is reported at a later step."""
    inner, under_way, most = save.write_checkpoint, [], []

    def slow(snapshot, collect):
        under_way.append(snapshot.step)
        most.append(len(under_way))
        time.sleep(0.05)
        under_way.pop()
        if snapshot.step == 8:
            raise CheckpointError("checkpoint at step 8 was not written: no space")
        if snapshot.step == 12:
            raise RuntimeError("rank 3\nwent away")
        return inner(snapshot, collect)

    monkeypatch.setattr(save, "write_checkpoint", slow)
    lines = []
    result = train(tiny(tmp_path, run={"async_checkpoint": True}), log=lines.append)
    assert result["error"] == "" and most == [1] * 5
    assert_same_run(whole[0], tmp_path, whole[1], result)
    failed = events(tmp_path)
    assert [name for _, name in failed] == ["checkpoint failed"] * 2
    assert 8 < failed[0][0] <= 12 < failed[1][0] <= 16
    assert any("step 8 was not written: no space" in x and "step-000004 is the" in x for x in lines)
    assert any("step 12 was not written: RuntimeError: rank 3 went away;" in x for x in lines)


def test_the_last_checkpoint_beside_training_counts(tmp_path, monkeypatch):
    def failing(snapshot, collect):
        raise CheckpointError(f"checkpoint at step {snapshot.step} was not written: no space")

    monkeypatch.setattr(save, "write_checkpoint", failing)
    config = tiny(tmp_path, run={"async_checkpoint": True, "checkpoint_every": 20})
    result = train(config)
    assert result["error"].startswith("checkpoint at step 20") and result["checkpoint"] is None


def test_a_full_disk_during_the_run(tmp_path):
    """A real file system that fills up: the run ends with exit code 1 and what was saved can be
    resumed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs more rights")
    try:
        config = tiny(tmp_path, run={"dir": str(place / "run")})

        def fill(line):
            if line.startswith("step  6/20"):
                free = os.statvfs(place)
                (place / "filler").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 50_000))

        result = train(config, log=fill)
        assert result["steps"] == 20 and "o space left" in result["error"]
        assert Path(result["checkpoint"]).name == "step-000004"
        (place / "filler").unlink()
        resumed = train(config, resume=place / "run")
        assert resumed["error"] == "" and resumed["steps"] == 20
        assert resumed["val_bits_per_byte"] == result["val_bits_per_byte"]
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_folder_with_a_run_is_refused(tmp_path):
    config = tiny(tmp_path, optim={"steps": 4})
    train(config)
    with pytest.raises(UsageError, match="already holds a run; go on with `--resume.*--overwrite"):
        train(config)
    assert train(config, overwrite=True)["steps"] == 4
    assert [r["step"] for r in records(tmp_path) if "val_loss" in r] == [0, 4]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    config = tiny(tmp_path)
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UsageError, match="cannot write .*; choose another folder$"):
        train(config)
    read_only = tmp_path / "ro"
    read_only.mkdir()
    bind = ["mount", "-t", "tmpfs", "-o", "ro,size=4k", "tmpfs", str(read_only)]
    if subprocess.run(bind, capture_output=True, check=False).returncode == 0:
        try:
            with pytest.raises(UsageError, match="cannot write .*Read-only file system"):
                train(tiny(tmp_path, run={"dir": str(read_only)}))
        finally:
            subprocess.run(["umount", "-l", str(read_only)], check=True)


def test_leaks_into_training_are_told(tmp_path):
    """In the log, in run.json and in the report; `dedup` says what it left out."""
    lines = [json.dumps({"text": f"one of {i % 12} texts of some length"}) for i in range(60)]
    config = tiny(tmp_path, optim={"steps": 1})
    (tmp_path / "leak.jsonl").write_text("\n".join(lines))
    source = (str(tmp_path / "leak.jsonl"),)
    for dedup, short in (("none", "3 of 3 validation documents are trained on"), ("exact", "")):
        data = dataclasses.replace(config.data, source=source, dedup=dedup)
        said: list[str] = []
        train(dataclasses.replace(config, data=data), overwrite=True, log=said.append)
        overlap = json.loads((tmp_path / "run" / "run.json").read_text())["overlap"]
        assert overlap["validation_documents"] == 3 and overlap["shared"] == (3 if short else 0)
        notes = [line for line in said if line.startswith("note: ") and "validation doc" in line]
        assert len(notes) == 1 and overlap["sentence"] in notes[0]
        page = load_run(tmp_path / "run")
        assert page["leak"] == {"sentence": overlap["sentence"], "short": short}
    assert overlap["removed_shared"] == 12 and overlap["removed_repeated"] == 36
