"""Norm, activations and dense network of a `headway` model; shapes as in modeling_headway.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def n_inputs(activation: str) -> int:
    """Return G."""
    return 2 if activation.startswith("swiglu") else 1


def activate(pre: Tensor, activation: str) -> Tensor:
    """Return silu(gate)·up (SwiGLU), that of GPT-OSS (with clamped gate and up, (up + 1)·gate·
    σ(1.702·gate)), max(x, 0)² or exact (erf) GELU: `[..., G·F]` → `[..., F]`."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "swiglu_clamped":
        gate, up = pre.chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return F.relu(pre).square() if activation == "relu2" else F.gelu(pre)


class StaysFloat32(nn.Module):
    """A module whose weights stay float32 where the model is cast to bfloat16 or float16: routers,
    since rounded ones choose other experts, and norms."""

    def _apply(self, fn, recurse=True):
        def wide(x: Tensor) -> Tensor:
            y = fn(x)
            narrow = y.dtype in (torch.bfloat16, torch.float16)
            return x.to(y.device, torch.float32) if narrow else y

        return super()._apply(wide, recurse)


class RMSNorm(StaysFloat32):
    """Learnable RMSNorm over the last dim; `shape` is `(D,)`, or `(H, L)` for a row per head."""

    def __init__(self, *shape: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class FeedForward(nn.Module):
    """Dense feed-forward network, D → F → D, also the shared expert."""

    def __init__(self, d_model: int, d_ff: int, activation: str):
        super().__init__()
        self.activation = activation
        self.gate_up_proj = nn.Linear(d_model, n_inputs(activation) * d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activate(self.gate_up_proj(x), self.activation))
