"""The progress of a run: all that a resumed run needs beside weights and optimiser state."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headway.config import RunConfig
from headway.eval.bits_per_byte import Evaluation
from headway.train.interval import Interval, SpikeDetector
from headway.train.step import Gradient


@dataclass
class Progress:
    """Numbers that a checkpoint keeps in state.json and restores exactly."""

    spikes: SpikeDetector
    step: int = 0
    """Number of steps done, skipped ones included; also the position in the data."""
    seconds: float = 0.0
    """Seconds of training, without evaluation, samples and checkpoints."""
    cpu_seconds: float = 0.0
    """CPU seconds of this process in them."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss: float | None = None
    """Nats per token of the last progress line."""
    first: Evaluation | None = None
    last: Evaluation | None = None
    best_bits_per_byte: float | None = None
    sample: str = ""
    """The last text sample, without its prompt."""
    load: list[Tensor] | None = None
    """`Gradient.load` of the last step that was applied: `[H, E]` per sparse layer, all heads."""
    interval: Interval = field(default_factory=Interval)

    def add_step(self, result: Gradient) -> None:
        """Add a step whose update was applied."""
        self.load = result.load
        self.spikes.add(result.loss)
        self.interval.add_step(result)

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Add the evaluation of this step."""
        self.first = self.first or evaluation
        self.last = evaluation
        best = self.best_bits_per_byte
        new = evaluation.val_bits_per_byte
        self.best_bits_per_byte = new if best is None else min(best, new)

    def out_of_time(self, run: RunConfig) -> bool:
        """Return whether `max_seconds` of training are over."""
        return 0 < run.max_seconds <= self.seconds

    def why_stop(self, run: RunConfig) -> str:
        """Return why the run should end before its last step; empty when it should continue."""
        if self.out_of_time(run):
            return (
                f"{self.seconds:.1f} s of training reach run.max_seconds={run.max_seconds:g} "
                "(to go on: resume with --run.max-seconds 0)"
            )
        if self.last is not None and self.last.val_bits_per_byte <= run.stop_bits_per_byte:
            return (
                f"{self.last.val_bits_per_byte:.4f} bits/byte reach "
                f"run.stop_bits_per_byte={run.stop_bits_per_byte:g}"
            )
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; `restore` takes them."""
        plain = {k: v for k, v in vars(self).items() if k not in ("spikes", "interval", "load")}
        for name in ("first", "last"):
            plain[name] = None if plain[name] is None else plain[name].numbers()
        return {
            **plain,
            "load": None if self.load is None else [x.tolist() for x in self.load],
            "spikes": self.spikes.to_dict(),
            "interval": self.interval.to_dict(),
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Take over the state that `to_dict` gave, exactly."""
        first, last = (values[k] and Evaluation(**values[k]) for k in ("first", "last"))
        load = values.get("load")  # a checkpoint of before there was one resumes as step 0 begins
        objects = {
            "first": first,
            "last": last,
            "load": None if load is None else [torch.tensor(x) for x in load],
            "spikes": SpikeDetector(self.spikes.limit, **values["spikes"]),
            "interval": Interval.from_dict(values["interval"]),
        }
        vars(self).update({**values, **objects})
