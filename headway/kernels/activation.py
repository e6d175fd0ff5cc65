"""Activations of experts and feed-forward networks, with the derivative written out.

F hidden width · G = 2 for SwiGLU (gate, then up), else 1. Pre-activations come as `[..., G·F]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor



def n_inputs(activation: str) -> int:
    """G, how many pre-activations one hidden unit reads: 2 for SwiGLU, else 1."""
    return 2 if activation == "swiglu" else 1


def activate(pre: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """`[..., G·F]` → `[..., F]`. SwiGLU silu(gate)·up, ReLU² max(x, 0)², or exact (erf) GELU. `out` is for no-grad use."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate) * up if out is None else torch.mul(_silu(gate, out), up, out=out)
    if activation == "relu2":
        return F.relu(pre).square() if out is None else torch.square(F.relu(pre), out=out)
    return F.gelu(pre) if out is None else torch.ops.aten.gelu.out(pre, out=out)


def _silu(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(x, out=out)


def activate_backward(dhid: Tensor, pre: Tensor, activation: str, out: Tensor) -> Tensor:
    """Gradient of `activate`: `dhid [..., F]` and `pre [..., G·F]` → `out [..., G·F]`. `dhid` may be overwritten."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(_silu(gate, d_up), dhid, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dhid.mul_(up), gate, grad_input=d_gate)
        return out
    if activation == "relu2":
        return torch.mul(dhid, F.relu(pre).mul_(2), out=out)
    return torch.ops.aten.gelu_backward.grad_input(dhid, pre, grad_input=out)
