"""The records of a run: metrics.jsonl, the lines for people, and the report."""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headway.config import Config, UsageError
from headway.eval.bits_per_byte import DocumentLosses
from headway.model.transformer import Transformer
from headway.parallel.dispatcher import MeshDispatcher
from headway.parallel.parallelize import Parallelism
from headway.parallel.straggler import StragglerDetector
from headway.plan.volume import token_bytes
from headway.report.html import write_report
from headway.report.metrics import progress_line
from headway.report.sinks import JsonlSink, NoSink
from headway.train.interval import Interval
from headway.train.progress import Progress
from headway.train.resolve import Sizes

Log = Callable[[str], None]
"""Takes one line for people."""


@dataclass
class Records:
    """Writes what happens in a run, each record with the step, its tokens and its seconds."""

    config: Config
    run_dir: Path
    model: Transformer
    sizes: Sizes
    parallelism: Parallelism
    progress: Progress
    sink: JsonlSink | NoSink
    log: Log

    def __post_init__(self) -> None:
        self._straggler = StragglerDetector(self.parallelism.mesh)
        dispatcher, element = self.parallelism.dispatcher, self.model.dtype.itemsize
        self._expected_bytes = (
            token_bytes(self.config, dispatcher.scheme, element)
            if isinstance(dispatcher, MeshDispatcher)
            else 0.0
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.config.data.batch_size * self.config.data.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of all steps so far: a pure function of the step."""
        return self.tokens_of(self.progress.step)

    def tokens_of(self, steps: int) -> int:
        """Return the tokens of the first `steps` steps, of which the last one may be smaller."""
        data = self.config.data
        last = data.last_batch_size or data.batch_size
        short = data.batch_size - last if steps == self.config.optim.steps else 0
        return steps * self.tokens_per_step - short * data.seq_len

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. A write error, as on a full disk, is logged and otherwise ignored."""
        counters = {"step": self.progress.step, "tokens": self.tokens}
        try:
            self.sink.write({**counters, "seconds": self.progress.seconds, **record})
        except OSError as error:
            self.log(f"metrics of step {self.progress.step} were not written: {error.strerror}")

    def write_documents(self, documents: DocumentLosses) -> None:
        """Write documents.npz, the loss of each validation document at the end of the run, with
        which it can be compared to others later. A write error is logged and otherwise ignored."""
        if not self.parallelism.mesh.is_main:
            return
        try:
            documents.save(self.run_dir / "documents.npz")
        except OSError as error:
            self.log(f"documents.npz was not written: {error.strerror}")

    def event(self, name: str, detail: str) -> None:
        """Record something that the reader of the report should know."""
        self.write({"event": name, "detail": detail})

    def write_interval(self, lr: float) -> None:
        """Record the interval that ends here, print the progress line and begin a new interval."""
        progress, steps = self.progress, self.config.optim.steps
        interval, progress.interval = progress.interval, Interval()
        record = interval.record()
        speed = record["tokens_per_second"]
        record |= {
            "lr": lr,
            "flops_per_second": self.sizes.flops_per_token * speed,
            "memory_gib": _peak_memory_gib(self.model.device),
            "skipped": progress.skipped,
            **self._traffic(interval),
        }
        progress.loss = record["loss"] if interval.steps else None
        self.write(record)
        eta = (steps - progress.step) * (self.tokens_per_step / speed)
        self.log(progress_line({"step": progress.step, **record}, steps, eta))
        if sentence := self._straggler.slow_rank(interval.seconds):
            self.log(sentence)

    def _traffic(self, interval: Interval) -> dict[str, Any]:
        """Return what this rank sent in the interval, per step; nothing in a single process."""
        mesh = self.parallelism.mesh
        if mesh.size == 1:
            return {}
        steps = interval.tokens / self.tokens_per_step
        layers = self._traffic_of_layers(steps, interval.seconds)
        counts = mesh.traffic.take()
        tokens = [c["bytes"] for key, c in counts.items() if key[:3] in ("hp ", "ep ")]
        waited = sum(c["wait"] for c in counts.values())
        return {
            "wire": {key: c | {"bytes": c["bytes"] / steps} for key, c in counts.items()},
            "wire_bytes": sum(tokens) / steps,
            "wire_expected": self._expected_bytes,
            "wire_wait": waited / max(interval.seconds, 1e-9),
            "wire_layers": layers,
        }

    def _traffic_of_layers(self, steps: float, seconds: float) -> dict[str, list[float]]:
        """Return the columns of `wire_layers` (report/metrics.py), one row per block."""
        sparse, blocks = self.model.sparse_layers(), self.model.blocks()
        expected = self._expected_bytes / max(1, len(sparse))
        columns: dict[str, list[float]] = {}
        for layer, axes in self.parallelism.mesh.traffic.by_layer().items():
            tokens = sum(c.bytes for axis, c in axes.items() if axis in ("hp", "ep"))
            row = {
                "layer": layer,
                "bytes": tokens / steps,
                "expected": expected if blocks[layer].ffn in sparse else 0.0,
                "weights": (sum(c.bytes for c in axes.values()) - tokens) / steps,
                "wait": round(sum(c.wait for c in axes.values()) / max(seconds, 1e-9), 6),
            }
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        return columns

    def write_report(self) -> str | None:
        """Write report.html and return its path; None on ranks that write no files, or when it
        could not be written, which is logged."""
        if not self.parallelism.mesh.is_main:
            return None
        try:
            return str(write_report([self.run_dir], self.run_dir / "report.html"))
        except (OSError, UsageError) as error:
            self.log(f"the report was not written: {error}")
            return None


def _peak_memory_gib(device: torch.device) -> float:
    """Return the peak so far: memory allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
