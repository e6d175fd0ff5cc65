"""Activations of experts and feed-forward networks, with the derivative written out.

F hidden width · G = 2 for SwiGLU (gate, then up), else 1. Pre-activations come as `[..., G·F]`.

`swiglu_clamped` (GPT-OSS): with g = min(gate, 7) and u = max(−7, min(up, 7)), (u + 1)·g·σ(1.702·g).
`activate` is one pass over memory each way in `cpu/pointwise.cpp` and keeps only its input."""

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.config import n_inputs
from headway.kernels.cpp import cpp_kernels, undispatched
from headway.kernels.differentiate import reference_grads, transformed

LIMIT, ALPHA = 7.0, 1.702
"""Constants of `swiglu_clamped`."""
ACTIVATIONS = ("swiglu", "relu2", "gelu", "swiglu_clamped")
"""Activations by the numbers that `cpu/activation.h` knows them by."""


def activate_reference(pre: Tensor, activation: str) -> Tensor:
    """Return silu(gate)·up (SwiGLU), that of clamped ones, max(x, 0)² or exact (erf) GELU:
    `[..., G·F]` → `[..., F]`."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "swiglu_clamped":
        gate, up = _clamped(pre)
        return (up + 1) * gate * torch.sigmoid(ALPHA * gate)
    return F.relu(pre).square() if activation == "relu2" else F.gelu(pre)


def _clamped(pre: Tensor) -> tuple[Tensor, Tensor]:
    """Return gate and up of `swiglu_clamped`."""
    gate, up = pre.chunk(2, dim=-1)
    return gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)


def activate(pre: Tensor, activation: str) -> Tensor:
    """Return what `activate_reference` does; on CPUs in float32 arithmetic, rounded once."""
    if cpp_kernels().supports(pre) and not transformed():
        return (_activate if undispatched(pre) else _forward)(pre, activation)
    return activate_reference(pre, activation)


def _activate(pre: Tensor, activation: str) -> Tensor:
    """Run the C++ kernel."""
    pre = pre.contiguous()
    width = pre.shape[-1] // n_inputs(activation)
    hid = pre.new_empty(*pre.shape[:-1], width)
    cpp_kernels().call("activation", pre.dtype, pre, *_sizes(pre, activation), hid)
    return hid


_forward = torch.library.custom_op("headway::activate", _activate, mutates_args=())


@torch.library.custom_op("headway::activate_backward", mutates_args=())
def _backward(d_hid: Tensor, pre: Tensor, activation: str) -> Tensor:
    """Return the gradient of `pre`."""
    d_hid, pre = d_hid.contiguous(), pre.contiguous()
    d_pre = torch.empty_like(pre)
    sizes = _sizes(pre, activation)
    cpp_kernels().call("activation_backward", pre.dtype, d_hid, pre, *sizes, d_pre)
    return d_pre


def _sizes(pre: Tensor, activation: str) -> tuple[int, int, int]:
    """Return rows, F and the activation's number in `cpu/activation.h`."""
    rows = pre.shape[:-1].numel()
    return rows, pre.shape[-1] // n_inputs(activation), ACTIVATIONS.index(activation)


@_forward.register_fake
def _(pre, activation):
    return pre.new_empty(*pre.shape[:-1], pre.shape[-1] // n_inputs(activation))


@_backward.register_fake
def _(d_hid, pre, activation):
    return torch.empty_like(pre, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    pre, ctx.activation = inputs
    ctx.save_for_backward(pre)


def _autograd(ctx, d_hid):
    if torch.is_grad_enabled():

        def reference(pre: Tensor) -> tuple[Tensor]:
            return (activate_reference(pre, ctx.activation),)

        return *reference_grads(reference, ctx.saved_tensors, (True,), (d_hid,)), None
    return _backward(d_hid, *ctx.saved_tensors, ctx.activation), None


_forward.register_autograd(_autograd, setup_context=_save)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Return cap·tanh(logits/cap), a soft bound; the logits themselves for a cap of 0.

    Without gradients float32 on CPUs is computed in C++, where an element does not depend on where
    it lies: PyTorch's own ends a tensor with another tanh."""
    if not cap:
        return logits
    native = cpp_kernels().supports(float32=(logits,)) and undispatched(logits)
    if not native or transformed():
        return cap * torch.tanh(logits / cap)
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    cpp_kernels().call("softcap", torch.float32, logits, logits.numel(), float(cap), out)
    return out


def gate_heads(y: Tensor, gate: Tensor) -> Tensor:
    """Return y·σ(gate): `[..., N, d]` gated by `[..., N]`, in y's dtype. As `softcap` without
    gradients, float32 arithmetic rounded once."""
    native = cpp_kernels().supports(y, gate) and y.dtype == gate.dtype and undispatched(y)
    if not native or transformed():
        return y * torch.sigmoid(gate).unsqueeze(-1)
    y, out = y.contiguous(), torch.empty(y.shape, dtype=y.dtype)
    arguments = (y, gate.contiguous(), gate.numel(), y.shape[-1], out)
    cpp_kernels().call("gate_heads", y.dtype, *arguments)
    return out


def activate_into(pre: Tensor, activation: str, hid: Tensor) -> Tensor:
    """Write `activate_reference` into `hid [..., F]`, without autograd."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return torch.ops.aten.silu.out(gate, out=hid).mul_(up)
    if activation == "swiglu_clamped":
        gate, up = _clamped(pre)
        return torch.mul(gate, ALPHA, out=hid).sigmoid_().mul_(gate).mul_(up + 1)
    if activation == "relu2":
        return torch.clamp_min(pre, 0, out=hid).square_()
    return torch.ops.aten.gelu.out(pre, out=hid)


def activate_with_slope(pre: Tensor, activation: str, hid: Tensor, slope: Tensor) -> None:
    """Write `hid [..., F]` and ∂hid/∂pre, `slope [..., G·F]`, with one exponential for both."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        d_gate, d_up = slope.chunk(2, dim=-1)
        torch.sigmoid(gate, out=d_gate)
        torch.mul(gate, d_gate, out=d_up)  # silu(gate) = ∂hid/∂up
        torch.mul(d_up, up, out=hid)
        # silu'(gate) = s + silu·(1 − s)
        d_gate.addcmul_(d_up, d_gate, value=-1).add_(d_up).mul_(up)
    elif activation == "swiglu_clamped":
        gate, up = _clamped(pre)
        within_gate, within_up = (pre == torch.cat((gate, up), -1)).chunk(2, dim=-1)
        sigmoid = torch.sigmoid(ALPHA * gate)
        glu = gate * sigmoid
        d_gate, d_up = slope.chunk(2, dim=-1)
        torch.mul(glu, within_up, out=d_up)
        torch.mul(glu, up + 1, out=hid)
        d_gate.copy_((sigmoid + ALPHA * glu * (1 - sigmoid)) * (up + 1) * within_gate)
    elif activation == "relu2":
        torch.clamp_min(pre, 0, out=hid)
        torch.mul(hid, 2, out=slope)
        hid.square_()
    else:
        torch.ops.aten.gelu.out(pre, out=hid)
        torch.ops.aten.gelu_backward.grad_input(torch.ones_like(pre), pre, grad_input=slope)
