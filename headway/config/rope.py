"""Options of rotary position embedding: which dims it turns, and how its frequencies are scaled to
contexts longer than those of pre-training."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from headway.config.bounds import above_zero, at_least
from headway.config.errors import UsageError

RopeScaling = Literal["none", "linear", "llama3", "yarn"]

_EVERY = {"rotary_dim", "interleaved", "scaling"}
SCALING_FIELDS: dict[str, set[str]] = {
    "none": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_len", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", "original_max_len", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    },
}
"""Scaling → the fields that it reads."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding beyond its base, `model.rope_theta`. The fields are `rope_parameters` of
    Transformers."""

    rotary_dim: int = 0
    """Dims of an attention head that are rotated, the first ones, an even number (partial rotary
    embedding: GLM-4); 0 is all."""
    interleaved: bool = False
    """Rotates neighbours (0, 1), (2, 3), … (DeepSeek) instead of dims half a head apart."""
    scaling: RopeScaling = "none"
    """How frequencies are scaled. `linear`: all by 1/factor. `llama3`: the low ones (Llama 3.1).
    `yarn`: a ramp between scaled and unscaled (arXiv 2309.00071)."""
    factor: float = 1.0
    """Length of the context over that of pre-training; ≥ 1."""
    original_max_len: int = 0
    """Positions of pre-training's context (`original_max_position_embeddings`)."""
    low_freq_factor: float = 1.0
    """`llama3`: wavelengths above original_max_len / low_freq_factor are scaled."""
    high_freq_factor: float = 4.0
    """`llama3`: wavelengths below original_max_len / high_freq_factor are not."""
    beta_fast: float = 32.0
    """`yarn`: dims that turn more often than this over the original context are not scaled."""
    beta_slow: float = 1.0
    """`yarn`: dims that turn less often than this are scaled in full."""
    truncate: bool = True
    """`yarn`: rounds the ends of the ramp to whole dims (GPT-OSS does not)."""
    attention_factor: float = 0.0
    """`yarn`: multiplies rotated queries and keys; 0 means 0.1·ln(factor) + 1, or what `mscale` and
    `mscale_all_dim` give."""
    mscale: float = 0.0
    """`yarn`: with `mscale_all_dim`, the attention factor is the quotient of 0.1·m·ln(factor) + 1
    of both (DeepSeek); 0 is off."""
    mscale_all_dim: float = 0.0
    """`yarn`: see `mscale`; latent attention also multiplies its scores by the square of
    0.1·mscale_all_dim·ln(factor) + 1; 0 is off."""

    @property
    def table_factor(self) -> float:
        """Return what multiplies the tables of cosines and sines."""
        if self.scaling != "yarn":
            return 1.0
        if self.attention_factor:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def score_factor(self) -> float:
        """Return what multiplies the scores of latent attention beside 1/√d."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def check(self, width: int, theta: float) -> None:
        """Raise UsageError where the options do not fit each other, heads of `width` dims or the
        base `theta`."""
        if self.scaling not in get_args(RopeScaling):
            raise UsageError(
                f"model.rope.scaling={self.scaling} is not known; "
                f"use {', '.join(get_args(RopeScaling))}"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= width:
            raise UsageError(
                f"model.rope.rotary_dim={self.rotary_dim} must be even and at most {width}, the "
                "width of a head; use 0 for all of it"
            )
        read = SCALING_FIELDS[self.scaling]
        for field in fields(self):
            value = vars(self)[field.name]
            if field.name not in _EVERY | read and value != field.default:
                raise UsageError(
                    f"model.rope.{field.name}={value} has no effect with scaling={self.scaling}; "
                    f"use {field.default}, or another scaling"
                )
        at_least(1, "model.rope", vars(self), "factor")
        at_least(0, "model.rope", vars(self), "attention_factor mscale mscale_all_dim")
        above_zero("model.rope", vars(self), "low_freq_factor beta_slow")
        if self.scaling == "yarn" and theta <= 1:
            raise UsageError(
                f"model.rope_theta={theta} with scaling=yarn turns no dim slower than another; "
                "use a base above 1"
            )
        if "original_max_len" in read:
            at_least(1, "model.rope", vars(self), "original_max_len")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not vars(self)[low] < vars(self)[high] < math.inf:  # also false for NaN
                raise UsageError(
                    f"model.rope.{low}={vars(self)[low]} must lie below "
                    f"{high}={vars(self)[high]}; use 1 and {'4' if high[0] == 'h' else '32'}"
                )

    def _magnitude(self, m: float) -> float:
        return 0.1 * m * math.log(self.factor) + 1.0
