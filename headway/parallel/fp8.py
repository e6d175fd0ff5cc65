"""FP8 communication of sub-tokens: e4m3 with one float32 scale per row.

e4m3 has 3 bits of mantissa, so the error of a value that is not tiny compared with the largest of
its row is at most 2⁻⁴ of itself, 2.6e-2 rms. Rows are scaled so that their largest value is the
largest of e4m3: the relative error does not depend on the scale of the data."""

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `[..., L]` in e4m3, and float32 scales `[..., 1]`. A row with NaN or infinity becomes
    NaN, and 0 stays 0."""
    scale = x.abs().amax(-1, keepdim=True).float() / LARGEST
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def widen(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of scaled e4m3, rounded to `dtype`."""
    return (x.float() * scale).to(dtype)
