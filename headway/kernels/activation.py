"""Activations of experts and feed-forward networks, with the derivative written out.

F hidden width · G = 2 for SwiGLU (gate, then up), else 1. Pre-activations come as `[..., G·F]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def n_inputs(activation: str) -> int:
    """G, how many pre-activations one hidden unit reads: 2 for SwiGLU, else 1."""
    return 2 if activation == "swiglu" else 1


def activate(pre: Tensor, activation: str) -> Tensor:
    """`[..., G·F]` → `[..., F]`: SwiGLU silu(gate)·up, ReLU² max(x, 0)², or exact (erf) GELU.
    Autograd knows it.
    """
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.relu(pre).square() if activation == "relu2" else F.gelu(pre)


def activate_into(pre: Tensor, activation: str, hid: Tensor) -> Tensor:
    """`activate` into `hid [..., F]`, without autograd."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return torch.ops.aten.silu.out(gate, out=hid).mul_(up)
    if activation == "relu2":
        return torch.clamp_min(pre, 0, out=hid).square_()
    return torch.ops.aten.gelu.out(pre, out=hid)


def activate_with_slope(pre: Tensor, activation: str, hid: Tensor, slope: Tensor) -> None:
    """`activate` into `hid [..., F]` and ∂hid/∂pre into `slope [..., G·F]`, with one exponential
    for both.
    """
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        d_gate, d_up = slope.chunk(2, dim=-1)
        torch.sigmoid(gate, out=d_gate)
        torch.mul(gate, d_gate, out=d_up)  # silu(gate) = ∂hid/∂up
        torch.mul(d_up, up, out=hid)
        # silu'(gate) = s + silu·(1 − s)
        d_gate.addcmul_(d_up, d_gate, value=-1).add_(d_up).mul_(up)
    elif activation == "relu2":
        torch.clamp_min(pre, 0, out=hid)
        torch.mul(hid, 2, out=slope)
        hid.square_()
    else:
        torch.ops.aten.gelu.out(pre, out=hid)
        torch.ops.aten.gelu_backward.grad_input(torch.ones_like(pre), pre, grad_input=slope)
