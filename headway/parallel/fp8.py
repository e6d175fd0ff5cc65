"""Sub-tokens in eight bits on the wire: e4m3 with one float32 scale per row.

e4m3 has 3 bits of mantissa, so a value that is not tiny beside the largest of its row is off by at
most 2⁻⁴ of itself, 2.6e-2 rms. Rows are scaled so that their largest value is the largest of e4m3:
the error does not depend on the scale of the data.
"""

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., L]` → e4m3 `[..., L]` and float32 scales `[..., 1]`. A row with NaN or infinity
    becomes NaN, and 0 stays 0."""
    scale = x.abs().amax(-1, keepdim=True).float() / LARGEST
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def widen(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, rounded to `dtype`."""
    return (x.float() * scale).to(dtype)
