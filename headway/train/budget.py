"""What a run may use: steps, tokens, FLOPs or CPU seconds, and the number of steps that this is."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from headway.config import Config, UsageError

_UNITS = {
    "steps": ("steps", 1.0),
    "tokens": ("tokens", 1.0),
    "Mtokens": ("tokens", 1e6),
    "Gtokens": ("tokens", 1e9),
    "flops": ("flops", 1.0),
    "cpu-s": ("cpu_seconds", 1.0),
    "cpu-min": ("cpu_seconds", 60.0),
}
"""Unit → (field of `Budget`, its size)."""


@dataclass(frozen=True)
class Budget:
    """The budget of a run; exactly one field is set. Each stands for a number of steps that is
    known before step 0, so that the learning rate follows the share that is used; a clock never
    ends a run."""

    steps: int = 0
    """Optimiser steps."""
    tokens: float = 0.0
    """Training tokens."""
    flops: float = 0.0
    """FLOPs of training that are executed, forward and backward."""
    cpu_seconds: float = 0.0
    """CPU seconds of training, at the calibrated time of a step."""

    def __post_init__(self) -> None:
        """Raise UsageError unless exactly one field is set, and above 0."""
        used = {name: value for name, value in vars(self).items() if value}
        if len(used) != 1 or not 0 < min(used.values()) < float("inf"):
            raise UsageError(
                f"a budget is one of steps, tokens, flops and cpu_seconds, above 0, and not {used}"
            )

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Return the budget of `400steps`, `20Mtokens`, `1e13flops` or `2cpu-min`."""
        number = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z-]+)", text.strip())
        if number is None or number[2] not in _UNITS or number[1].count(".") > 1:
            raise UsageError(
                f"budget {text!r} is no number with a unit; use 400steps, 20Mtokens, 1e13flops or "
                "2cpu-min"
            )
        name, size = _UNITS[number[2]]
        amount = float(number[1]) * size
        if name == "steps" and amount != int(amount):
            raise UsageError(f"budget {text!r} is no whole number of steps; use {int(amount)}steps")
        if not amount:
            raise UsageError(f"budget {text!r} is nothing; use 400steps, or another one above 0")
        values: dict[str, Any] = {name: int(amount) if name == "steps" else amount}
        return cls(**values)

    def __str__(self) -> str:
        name, value = next((n, v) for n, v in vars(self).items() if v)
        unit = name.replace("cpu_seconds", "CPU seconds").replace("flops", "FLOPs")
        return f"{value:,} {unit}" if name == "steps" else f"{value:.6g} {unit}"

    def fit(self, config: Config, flops_per_token: float, step_seconds: float = 0.0) -> Config:
        """Return `config` with the steps of this budget, the last one as small as it takes.

        Args:
            flops_per_token: of training, executed.
            step_seconds: calibrated CPU seconds of a step; needed for `cpu_seconds` alone.
        Raises: UsageError where the budget is less than a step."""
        rows = self._rows(config, flops_per_token, step_seconds)
        batch = config.data.batch_size
        steps, rest = divmod(round(rows), batch)
        data, optim = config.data, config.optim
        at_once = config.mesh.size * (data.micro_batch_size or 1)
        rest -= rest % (at_once if rest > at_once else config.mesh.size)
        if not steps:
            raise UsageError(
                f"a budget of {self} is less than a step of {batch} × {data.seq_len} tokens; "
                "raise it, or lower data.batch_size"
            )
        return dataclasses.replace(
            config,
            data=dataclasses.replace(data, last_batch_size=rest),
            optim=dataclasses.replace(optim, steps=steps + (rest > 0)),
        )

    def _rows(self, config: Config, flops_per_token: float, step_seconds: float) -> float:
        """Return the number of sequences; whole steps for CPU seconds, which are a measurement."""
        data = config.data
        if self.steps:
            return self.steps * data.batch_size
        if self.tokens:
            return self.tokens / data.seq_len
        if self.flops:
            return self.flops / flops_per_token / data.seq_len
        assert step_seconds > 0, "a budget of CPU seconds needs a calibrated step"
        return int(self.cpu_seconds / step_seconds) * data.batch_size
