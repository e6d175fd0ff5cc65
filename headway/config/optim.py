"""Options of the optimiser and its schedule."""

from dataclasses import dataclass
from typing import Literal

from headway.config.bounds import above_zero, at_least
from headway.config.errors import UsageError


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule, clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises every matrix of the blocks (stacked experts too) and leaves the rest to
    AdamW."""
    steps: int = 1000
    """Optimiser steps of the run; ≥ 1."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_experts: bool = True
    """Whether `muon` takes the stacked experts too. Without, AdamW does: a step costs less, since
    Newton–Schulz orthogonalises every expert whatever the number of tokens."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    muon_adjust: Literal["original", "match_rms_adamw"] = "original"
    """How Muon's rate follows the shape of a matrix, as in torch.optim.Muon: `original` √max(1,
    rows/columns); `match_rms_adamw` 0.2·√max(rows, columns), so that AdamW's rates fit (then set
    muon_lr to lr)."""
    embed_lr_scale: float = 1.0
    """Multiplies the learning rate of the embedding and the output head."""
    router_lr_scale: float = 1.0
    """Multiplies the learning rate of the routers."""
    expert_lr_scale: float = 1.0
    """Multiplies the learning rate of the experts."""
    schedule: Literal["wsd", "cosine", "trapezoid"] = "wsd"
    """Learning rate after warm-up. `wsd`: constant, then down by 1−√x to min_lr_ratio. `cosine`:
    half a cosine. `trapezoid`: constant, then linearly to min_lr_ratio."""
    warmup: float = 0.02
    """Share of the steps over which the rate rises linearly from 0; 0 ≤ warmup < 1."""
    warmup_steps: int = 0
    """Steps over which it does, in place of that share; 0 is off. Runs of different lengths that
    have it in common begin alike, so that they can branch off one another."""
    decay: float = 0.3
    """Share of the steps in which `wsd` and `trapezoid` fall; 0 < decay ≤ 1 − warmup."""
    min_lr_ratio: float = 0.0
    """The rate at the last step over the peak rate; 0 ≤ ratio ≤ 1."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.95
    """AdamW's second decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's Nesterov momentum."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only, never on norms, biases or the embedding."""
    clip: float = 1.0
    """Largest global gradient norm; 0 is off."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of AdamW's moments. `bfloat16` saves 4 bytes per parameter and needs beta2 ≤ 0.99,
    since a slower average would be lost in rounding (DeepSeek-V3, arXiv 2412.19437 §3.3.3, keeps
    them so)."""
    spike: float = 0.0
    """A step whose loss exceeds the running mean by this many running standard deviations is
    skipped and counted; 0 is off. A non-finite step is always skipped and counted."""
    max_skipped: int = 20
    """The run fails after this many skipped steps in a row."""
    transfer: Literal["none", "width", "power"] = "none"
    """How rates that were tuned on a small run follow to this one. `width`: those of each parameter
    by its fan-in and the depth (maximal update parameterisation; `optim/transfer.py`). `power`:
    batch, rates, beta2 and eps by the tokens of the run (`config/power.py`)."""
    base_width: int = 128
    """`width`: the fan-in at which rates and epsilon hold as given. This default and the others
    are the sizes of the recipe `dense`."""
    base_layers: int = 4
    """`width`: the number of blocks at which they do."""
    base_batch: int = 4096
    """`power`: the tokens per step at which they do, beta2 too."""
    base_tokens: int = 2_048_000
    """`power`: the tokens of the run that was tuned."""

    def check(self) -> None:
        """Raise UsageError for a value out of range, or where warm-up and decay do not fit."""
        at_least(1, "optim", vars(self), "steps max_skipped")
        at_least(0, "optim", vars(self), "warmup_steps")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"optim.warmup={self.warmup} is outside 0 ≤ warmup < 1; try 0.02")
        if self.schedule != "cosine" and not 0 < self.decay <= 1 - self.warmup:
            raise UsageError(
                f"optim.decay={self.decay} does not fit beside optim.warmup={self.warmup}; "
                f"use 0 < decay ≤ {1 - self.warmup:g}"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise UsageError(f"optim.min_lr_ratio={self.min_lr_ratio} is outside 0…1; try 0")
        self._check_transfer()
        above_zero("optim", vars(self), "lr muon_lr eps")
        at_least(0, "optim", vars(self), "embed_lr_scale router_lr_scale expert_lr_scale")
        at_least(0, "optim", vars(self), "weight_decay clip spike")

        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= (value := vars(self)[name]) < 1:
                raise UsageError(f"optim.{name}={value} is outside 0 ≤ {name} < 1; try 0.9")
        if self.state_dtype == "bfloat16" and self.beta2 > 0.99:
            raise UsageError(
                f"optim.state_dtype=bfloat16 loses an average as slow as optim.beta2={self.beta2} "
                "in rounding; use beta2 ≤ 0.99 or state_dtype=float32"
            )

    def _check_transfer(self) -> None:
        """Raise UsageError for an unknown rule, and for a base of a rule that is not in use."""
        if self.transfer not in BASES:
            raise UsageError(f"optim.transfer={self.transfer} is not known; use none, width, power")
        for rule, names in BASES.items():
            at_least(1, "optim", vars(self), names)
            for name in names.split():
                value = vars(self)[name]
                if (
                    rule != self.transfer
                    and value != OptimConfig.__dataclass_fields__[name].default
                ):
                    raise UsageError(
                        f"optim.{name}={value} is of optim.transfer={rule}, and optim.transfer="
                        f"{self.transfer}; leave it out, or use {rule}"
                    )


BASES = {"none": "", "width": "base_width base_layers", "power": "base_batch base_tokens"}
"""Rule of `optim.transfer` → the fields that only it reads."""
