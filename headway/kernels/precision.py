"""Which dtype a computation has: float32 or better for scores, gates, sums and elementwise work;
bfloat16 for matmuls where the hardware has it."""

import contextlib

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return bfloat16 and float16 as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Give matmuls the dtype of their operands, also inside the caller's autocast."""
    device = x.device.type
    # `is_autocast_available` would be the question, but PyTorch 2.11 does not compile it
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def native_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16; emulation is far slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
