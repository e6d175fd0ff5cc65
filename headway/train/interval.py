"""Sums between two progress lines, and the running mean of the loss that detects spikes.

Both are part of a checkpoint, so a resumed run writes the same records as one that never stopped.
"""

import math
from typing import Any

import torch
from torch import Tensor

from headway.eval.bits_per_byte import bits_per_byte
from headway.report.metrics import load_summary
from headway.train.step import Gradient


class Interval:
    """Sums over the steps since the last record; skipped steps count only in `seconds` and
    `tokens`. `nats` and `targets`, as state.json names them, are `Gradient.loss_sum` and `weight`.
    """

    def __init__(self) -> None:
        self.tokens = self.targets = self.steps = 0
        self.seconds = self.bytes = self.nats = self.balance = self.grad_norm = 0.0
        self.counts: list[Tensor] = []
        """Rows per expert, float32 `[H, E]` per sparse layer (exact up to 2²⁴ rows)."""
        self.entropy: list[Tensor] = []
        """Routing entropy / log E, mean over tokens and heads; scalar per sparse layer."""

    def add_time(self, tokens: int, seconds: float) -> None:
        """Add the tokens and seconds of a step, skipped or not."""
        self.tokens += tokens
        self.seconds += seconds

    def add_step(self, step: Gradient) -> None:
        """Add a step whose update was applied."""
        weight = step.weight
        self.steps += 1
        self.nats += step.loss_sum
        self.targets += int(weight) if weight.is_integer() else weight  # counts stay whole in JSON
        self.bytes += step.bytes
        self.balance += step.balance
        self.grad_norm += step.norm
        # they stay on their device: moving them would wait for it at every step
        counts = [r.counts_HE for r in step.routes]
        entropy = [r.entropy_H.mean() for r in step.routes]
        if self.counts:
            counts = [a.to(b.device) + b for a, b in zip(self.counts, counts, strict=True)]
            entropy = [a.to(b.device) + b for a, b in zip(self.entropy, entropy, strict=True)]
        self.counts, self.entropy = counts, entropy

    def record(self) -> dict[str, Any]:
        """Return means under the names of report/metrics.py; NaN where every step was skipped."""
        steps = self.steps or math.nan
        load = [(c / c.mean(-1, keepdim=True).clamp(min=1e-9)).tolist() for c in self.counts]
        load = [[[round(x, 4) for x in head] for head in layer] for layer in load]
        return {
            "loss": self.nats / (self.targets or math.nan),
            "bits_per_byte": bits_per_byte(self.nats, self.bytes),
            "grad_norm": self.grad_norm / steps,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "balance_loss": self.balance / steps,
            **load_summary(load),
            "entropy": [round(float(e) / steps, 6) for e in self.entropy],
            "load": load,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; `from_dict` inverts this exactly."""
        tensors = {"counts": self.counts, "entropy": self.entropy}
        return {**vars(self), **{k: [t.tolist() for t in v] for k, v in tensors.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Interval":
        """Return the interval of a checkpoint."""
        interval = cls()
        vars(interval).update(values)
        interval.counts = [torch.tensor(c) for c in values["counts"]]
        interval.entropy = [torch.tensor(e) for e in values["entropy"]]
        return interval


class SpikeDetector:
    """Detects losses that are more than `limit` standard deviations above the running mean.

    Mean and variance are exponential averages over about 50 steps. The first `WARM` losses are no
    spikes. `limit` 0 is off."""

    DECAY = 0.98
    WARM = 20

    def __init__(
        self, limit: float, mean: float = 0.0, variance: float = 0.0, seen: int = 0
    ) -> None:
        self.limit, self.mean, self.variance, self.seen = limit, mean, variance, seen

    def is_spike(self, loss: float) -> bool:
        """Return whether this loss is a spike, without adding it."""
        warm = self.limit > 0 and self.seen >= self.WARM
        return warm and loss > self.mean + self.limit * math.sqrt(self.variance)

    def add(self, loss: float) -> None:
        """Add a loss that was no spike."""
        self.seen += 1
        rate = max(1 - self.DECAY, 1 / self.seen)
        difference = loss - self.mean
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference**2)

    def to_dict(self) -> dict[str, float]:
        """Return JSON-ready state: the arguments of the constructor beside `limit`."""
        return {"mean": self.mean, "variance": self.variance, "seen": self.seen}
