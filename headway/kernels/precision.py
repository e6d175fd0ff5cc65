"""Which dtype a computation has: float32 or better for scores, gates, sums and elementwise work."""

import contextlib

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """float32 of bfloat16 and float16; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Matmuls here have the dtype of their operands, also where the caller's autocast would narrow
    them."""
    device = x.device.type
    # `is_autocast_available` would be the question, but PyTorch 2.11 does not compile it
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
