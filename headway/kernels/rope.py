"""Rotary position embedding (arXiv 2104.09864), half-split form as in GPT-NeoX and Hugging Face's
Llama.
"""

import torch
from torch import Tensor


def rope_tables(
    positions_S: Tensor, d_head: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each `[S, 1, d_head/2]`, from float64: frequency i is theta^(−2i/d_head)."""
    i = torch.arange(d_head // 2, dtype=torch.float64, device=positions_S.device)
    angle = torch.outer(positions_S.double(), theta ** (-2 * i / d_head)).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [..., S, H, d]` by tables `[S, 1, d/2]`. The backward rotates back."""
    return _Rope.apply(x, cos, sin)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in plain operations."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, turn: int) -> Tensor:
    """Four passes over halves, written in place; `turn` −1 rotates back."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-turn)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=turn)
    return out
