"""Trackers get the records of metrics.jsonl, continue when a run is resumed, and cost it nothing when they fail."""

import json
import math
from importlib.util import find_spec
from typing import get_args

import pytest

from headway.config import TrackerName, UsageError
from headway.report.sinks import read_metrics
from headway.report.track import TensorBoard, TrackedSink, check_installed, log_to
from tests.train.tiny_run import assert_same_run, tiny, train

RECORDS = [{"step": s, "loss": 3.0 - s, "load": [[1.0]], "dead": s, "lr": None} for s in (1, 2, 3)]


def _scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value) as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def _sink(folder, names, lines=None):
    log = (lambda _: None) if lines is None else lines.append
    return TrackedSink(folder / "metrics.jsonl", names, {"optim.lr": 1e-3}, log)


class Remembers:
    def __init__(self):
        self.rows = []

    def write(self, step, numbers, texts):
        self.rows.append((step, numbers, texts))

    def close(self):
        pass


def test_a_record_is_its_finite_numbers_and_texts():
    tracker = Remembers()
    log_to(
        tracker,
        {"step": 4, "loss": 2, "bad": math.nan, "wire": {"a": 1}, "sample": "x", "lr": None},
    )
    assert tracker.rows == [(4, {"loss": 2.0}, {"sample": "x"})]


def test_tensorboard_has_every_scalar_and_resumes_after_its_step(tmp_path):
    pytest.importorskip("tensorboard")
    with _sink(tmp_path, ("tensorboard",)) as sink:
        for record in RECORDS:
            sink.write(record)
    folder = tmp_path / "track" / "tensorboard"
    assert _scalars(folder) == {
        "loss": [(1, 2.0), (2, 1.0), (3, 0.0)],
        "dead": [(1, 1.0), (2, 2.0), (3, 3.0)],
    }
    with _sink(tmp_path, ("tensorboard",)) as sink:
        assert sink.resume_at(2) == 1
        sink.write({"step": 2, "event": "resumed", "detail": "from step 2"})
        sink.write({"step": 3, "loss": 7.0})
    assert _scalars(folder)["loss"] == [(1, 2.0), (2, 1.0), (3, 7.0)]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]


def test_a_tracker_that_joins_later_gets_what_was_recorded(tmp_path):
    pytest.importorskip("tensorboard")
    with _sink(tmp_path, ()) as sink:
        for record in RECORDS:
            sink.write(record)
    with _sink(tmp_path, ("tensorboard",)) as sink:
        sink.resume_at(2)
        sink.write({"step": 3, "loss": 7.0})
    assert _scalars(tmp_path / "track" / "tensorboard")["loss"] == [(1, 2.0), (2, 1.0), (3, 7.0)]


def test_a_tracker_that_fails_is_one_line(tmp_path):
    pytest.importorskip("tensorboard")
    lines: list[str] = []
    (tmp_path / "track").write_text("no folder")
    with _sink(tmp_path, ("tensorboard",), lines) as sink:
        for record in RECORDS:
            sink.write(record)
    assert len(lines) == 1 and lines[0].startswith(
        "run.track: tensorboard could not begin and is off; metrics.jsonl has"
    )
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3

    lines.clear()
    (tmp_path / "track").unlink()
    sink = _sink(tmp_path, ("tensorboard",), lines)
    with sink:
        sink.write(RECORDS[0])
        assert sink._trackers is not None
        tracker = sink._trackers["tensorboard"]
        assert isinstance(tracker, TensorBoard)
        tracker._writer.close()
        vars(tracker)["_writer"] = None  # what it would do is an error now
        sink.write(RECORDS[1])
        sink.write(RECORDS[2])
    assert (
        len(lines) == 1 and "tensorboard failed at step 2 and is off; metrics.jsonl has" in lines[0]
    )
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 1, 2, 3]


def test_wandb_offline_keeps_its_name_over_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    lines: list[str] = []
    for first, rows in ((True, RECORDS), (False, [{"step": 4, "loss": 5.0}])):
        with _sink(tmp_path, ("wandb",), lines) as sink:
            if not first:
                sink.resume_at(3)
            for record in rows:
                sink.write(record)
    assert lines == []
    name = json.loads((tmp_path / "track" / "wandb.json").read_text())["id"]
    runs = sorted((tmp_path / "track" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(name) for run in runs)
    written = b"".join(path.read_bytes() for run in runs for path in run.glob("*.wandb"))
    assert written.count(b"loss") >= 4 and b"optim.lr" in written


def test_trackio_continues_a_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    lines: list[str] = []
    for first, rows in ((True, RECORDS), (False, [{"step": 4, "loss": 5.0}])):
        with _sink(tmp_path, ("trackio",), lines) as sink:
            if not first:
                sink.resume_at(3)
            for record in rows:
                sink.write(record)
    assert lines == []
    name = json.loads((tmp_path / "track" / "trackio.json").read_text())["id"]
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("headway", name)
    assert [(row["step"], row["loss"]) for row in logs] == [(1, 2.0), (2, 1.0), (3, 0.0), (4, 5.0)]


def test_a_run_with_a_tracker_is_the_same_run(tmp_path):
    pytest.importorskip("tensorboard")
    root = tmp_path / "plain"
    result = train(tiny(root))
    tmp_path = tmp_path / "tracked"
    tracked = train(tiny(tmp_path, run={"track": ("tensorboard",)}))
    assert_same_run(root, tmp_path, result, tracked)
    scalars = _scalars(tmp_path / "run" / "track" / "tensorboard")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    expected = [(r["step"], pytest.approx(r["val_loss"])) for r in records if "val_loss" in r]
    assert scalars["val_loss"] == expected and len(expected) == 5
    again = train(tiny(tmp_path, run={"track": ("tensorboard",)}), overwrite=True)
    assert again["val_loss"] == result["val_loss"]
    assert len(_scalars(tmp_path / "run" / "track" / "tensorboard")["val_loss"]) == 5


def test_mistakes_are_one_line(tmp_path):
    for names in (("tensorboards",), ("wandb", "wandb")):
        with pytest.raises(UsageError) as error:
            tiny(tmp_path, run={"track": names}).run.check()
        assert (
            str(error.value)
            == f"run.track={' '.join(names)}: use tensorboard, wandb, trackio, each once"
        )
    missing: list[TrackerName] = [n for n in get_args(TrackerName) if find_spec(n) is None]
    for name in missing:
        with pytest.raises(UsageError, match=rf"run.track={name} needs {name}, .*headway\[track\]"):
            check_installed((name,))
