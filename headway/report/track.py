"""Trackers of experiments, fed with the records of metrics.jsonl (`run.track`).

metrics.jsonl is always written, first, and stays the source: a tracker that joins a run later, or a
run that starts from a checkpoint of another, is given the records that are there. All that belongs
to a run lies in its folder, but for trackio's database ($TRACKIO_DIR, or its own default):

RUN/track/NAME.json    the tracker's name of this run: it continues under it when it is resumed
RUN/track/tensorboard  event files
RUN/track/wandb        offline runs, for `wandb sync`; $WANDB_MODE=online sends at once

A tracker that fails is switched off with one line; it costs neither the run nor its records."""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from headway.config import Config, TrackerName, UsageError, leaves
from headway.report.sinks import JsonlSink, read_metrics

PROJECT = "headway"


class Tracker(Protocol):
    """One run in a tracker, open for writing."""

    def write(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        """Log what a record has, under its names."""
        ...

    def close(self) -> None:
        """Write what is pending and end."""
        ...


class TensorBoard:
    """Event files; steps from `purge_step` on are hidden, since they will be done again."""

    def __init__(self, folder: Path, config: Mapping[str, Any], purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        if purge_step is None:
            self._writer.add_text("config", "\n".join(f"    {k} = {v}" for k, v in config.items()))

    def write(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        """Add scalars and texts; flush, so that a killed run loses none."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self._writer.add_text(name, text, step)
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; offline unless $WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, config: Mapping[str, Any], name: str, id: str) -> None:
        import wandb

        folder.parent.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            id=id,
            resume="allow",
            dir=str(folder.parent),
            config=dict(config),
            mode="offline" if "WANDB_MODE" not in os.environ else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        """Log a record; those of one step are one row there."""
        self._run.log({**numbers, **texts}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """A run in trackio's local database, which `trackio show` displays."""

    def __init__(self, config: Mapping[str, Any], id: str) -> None:
        import trackio

        with contextlib.redirect_stdout(None):  # its advertisement
            self._run = trackio.init(
                project=PROJECT,
                name=id,
                resume="allow",
                config=dict(config),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def write(self, step: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        """Log a record."""
        self._run.log({**numbers, **texts}, step=step)

    def close(self) -> None:
        """Finish the run."""
        import trackio

        with contextlib.redirect_stdout(None):
            trackio.finish()  # not the run's own, which would be repeated, and said, at exit


class TrackedSink(JsonlSink):
    """A metrics file whose records go to trackers too.

    Args:
        path: RUN/metrics.jsonl.
        names: trackers, as in `run.track`.
        config: leaves of the config, which trackers show beside the run.
        log: gets the line of a tracker that failed.
    Raises: UsageError for a tracker that is not installed."""

    def __init__(
        self,
        path: Path,
        names: tuple[TrackerName, ...],
        config: Mapping[str, Any],
        log: Callable[[str], None],
    ) -> None:
        check_installed(names)
        super().__init__(path)
        self._names, self._config, self._log = names, config, log
        self._trackers: dict[TrackerName, Tracker] | None = None
        self._purge_step: int | None = None

    def write(self, record: Mapping) -> None:
        """Append one record, then hand it to the trackers, which the first one opens: only then is
        it known at which step the run begins."""
        if self._trackers is None:
            self._trackers = {}
            for name in self._names:
                self._try(name, "could not begin", lambda name=name: self._begin(name))
        super().write(record)
        for name, tracker in list(self._trackers.items()):
            self._try(
                name, f"failed at step {record.get('step')}", lambda t=tracker: log_to(t, record)
            )

    def resume_at(self, step: int) -> int:
        """Drop records after the checkpoint's `step`, in trackers that can; return how many."""
        self._purge_step = step + 1
        return super().resume_at(step)

    def close(self) -> None:
        """Close file and trackers."""
        super().close()
        for name, tracker in list((self._trackers or {}).items()):
            self._try(name, "could not end", tracker.close)

    def _begin(self, name: TrackerName) -> None:
        """Open a tracker under its name of this run; give a new one the records of before."""
        assert self._trackers is not None
        folder = self.path.parent / "track"
        marker, goes_on = folder / f"{name}.json", False
        if marker.is_file():
            id, goes_on = json.loads(marker.read_text("utf-8"))["id"], True
        else:
            id = f"{self.path.parent.name}-{uuid.uuid4().hex[:8]}"
        match name:
            case "tensorboard":
                purge = self._purge_step if goes_on else None
                tracker: Tracker = TensorBoard(folder / name, self._config, purge)
            case "wandb":
                tracker = Wandb(folder / name, self._config, self.path.parent.name, id)
            case "trackio":
                tracker = Trackio(self._config, id)
        if not goes_on:
            for record in read_metrics(self.path):
                log_to(tracker, record)
            folder.mkdir(exist_ok=True)
            marker.write_text(json.dumps({"id": id}) + "\n", "utf-8")
        self._trackers[name] = tracker

    def _try(self, name: TrackerName, what: str, action: Callable[[], None]) -> None:
        """Do something with a tracker; where that fails, in whatever way, go on without it."""
        try:
            action()
        except Exception as error:
            assert self._trackers is not None
            self._trackers.pop(name, None)
            said = (str(error).splitlines() or [""])[0]
            self._log(
                f"run.track: {name} {what} and is off; metrics.jsonl has all records: "
                f"{type(error).__name__}: {said}"
            )


def open_sink(run_dir: Path, config: Config, log: Callable[[str], None]) -> JsonlSink:
    """Open the records of a run, and its trackers where it has some."""
    path, names = run_dir / "metrics.jsonl", config.run.track
    if not names:
        return JsonlSink(path)
    return TrackedSink(path, names, leaves(config.to_dict()), log)


def log_to(tracker: Tracker, record: Mapping) -> None:
    """Log a record of metrics.jsonl: its finite numbers and its texts; lists stay there."""
    values = {name: value for name, value in record.items() if name != "step"}
    numbers = {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    tracker.write(int(record.get("step", 0)), numbers, texts)


def check_installed(names: tuple[TrackerName, ...]) -> None:
    """Raise UsageError for a tracker whose package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(
                f"run.track={name} needs {name}, which is not installed; pip install "
                "'headway[track]', or leave it out"
            )
