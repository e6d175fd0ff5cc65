"""RMSNorm, alone and before a rotation (rope.py), with a hand-written backward, statistics in
float32: one pass over memory each way in `cpu/pointwise.cpp` and, on GPUs, `gpu/norm.py`; four in
PyTorch instead of autograd's nine."""

from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.cpp import cpp_kernels, undispatched
from headway.kernels.differentiate import reference_grads, transformed
from headway.kernels.gpu import gpu_kernels
from headway.kernels.precision import widen
from headway.kernels.rope import rope, rope_reference, rope_sizes


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) · weight over the last dim; `weight` broadcasts from the
    right (arXiv 1910.07467)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what `rms_norm_reference` does, `x [..., L]`, `weight [L]` or, by head, `[H, L]`."""
    if transformed():
        return rms_norm_reference(x, weight, eps)
    weight = widen(weight)  # a row or a few; its gradient is rounded once
    if _supports(x, weight):
        if undispatched(x) and not _on_gpu(x):
            return _norm_alone(x, weight, eps)
        return _forward(x, weight, eps, None, None)[0]
    return _RMSNorm.apply(x, weight, eps)


def norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `rope(rms_norm(x, weight, eps), cos, sin)`, `weight [d]`; rounded once by a kernel."""
    if not transformed() and _supports(x, weight, cos, sin):
        return (_norm if undispatched(x) else _forward)(x, weight, eps, cos, sin)[0]
    return rope(rms_norm(x, weight, eps), cos, sin)


def _supports(x: Tensor, *float32: Tensor) -> bool:
    """Return whether a kernel takes these, in C++ or on a GPU."""
    if cpp_kernels().supports(x, float32=float32):
        return True
    return _on_gpu(x) and all(t.dtype == torch.float32 for t in float32)


def _on_gpu(x: Tensor) -> bool:
    return x.shape[-1] <= WIDEST and gpu_kernels().supports(x)


WIDEST = 8192
"""Columns of a row that the GPU's kernels keep in registers."""


class HeadRotation(NamedTuple):
    """What happens to queries and keys before their scores: RMSNorm of each head, where there are
    weights, then rotation by `rope_tables` of the whole head, in halves."""

    tables: tuple[Tensor, Tensor]
    q_weight: Tensor | None
    k_weight: Tensor | None
    """`[d]`."""
    eps: float

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys `[..., S, heads, d]`, normed and rotated."""
        return self._turn(q, self.q_weight), self._turn(k, self.k_weight)

    def _turn(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return rope(x, *self.tables)
        return norm_rope(x, weight, self.eps, *self.tables)


def _norm(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (out, rotated if there are tables, 1/sqrt(mean(x²) + eps) of every row, float32)."""
    assert x.shape[-weight.dim() :] == weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    name, tables, sizes = _variant(x, weight, cos, sin)
    if _on_gpu(x):
        from headway.kernels.gpu import norm as gpu_norm  # imports Triton

        return gpu_norm.forward(x, weight, eps, *tables)
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    cpp_kernels().call(name, x.dtype, x, weight, *tables, *sizes, eps, out, scale)
    return out, scale


def _norm_alone(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the first result of `_norm`, when there will be no backward."""
    x, out, L = x.contiguous(), torch.empty(x.shape, dtype=x.dtype), weight.shape[-1]
    sizes = (x.numel() // L, weight.numel() // L, L)
    cpp_kernels().call("norm", x.dtype, x, weight.contiguous(), *sizes, eps, out, None)
    return out


def _variant(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[str, tuple[Tensor, ...], tuple[int, ...]]:
    """Return the C++ kernel's name, its tables and its sizes, with or without a rotation."""
    L = weight.shape[-1]
    if cos is None or sin is None:
        return "norm", (), (x.numel() // L, weight.numel() // L, L)
    assert weight.dim() == 1
    return "norm_rope", (cos.contiguous(), sin.contiguous()), rope_sizes(x, cos)


_forward = torch.library.custom_op("headway::rms_norm", _norm, mutates_args=())


@torch.library.custom_op("headway::rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    name, tables, sizes = _variant(x, weight, cos, sin)
    if _on_gpu(x):
        from headway.kernels.gpu import norm as gpu_norm

        return gpu_norm.backward(dy, x, weight, scale, *tables)
    dx, d_weight = torch.empty_like(x), torch.empty_like(weight)
    tensors = (dy, x, weight, scale, *tables)
    cpp_kernels().call(f"{name}_backward", x.dtype, *tensors, *sizes, dx, d_weight)
    return dx, d_weight


@_forward.register_fake
def _(x, weight, eps, cos, sin):
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), scale


@_backward.register_fake
def _(dy, x, weight, scale, cos, sin):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the output that is only kept
    x, weight, ctx.eps, cos, sin = inputs
    ctx.save_for_backward(x, weight, output[1], cos, sin)


def _autograd(ctx, dy, _):
    if dy is None:  # PyTorch may ask without a gradient
        return (None,) * 5
    if torch.is_grad_enabled():
        return (*_twice(ctx, dy, *ctx.saved_tensors[3:]), None, None)
    return (*_backward(dy, *ctx.saved_tensors), None, None, None)


def _twice(ctx, dy: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> tuple:
    """Return gradients of x, weight and eps that can be differentiated again."""

    def reference(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        y = rms_norm_reference(x, weight, ctx.eps)
        return (y if cos is None or sin is None else rope_reference(y, cos, sin),)

    inputs = ctx.saved_tensors[:2]
    return (*reference_grads(reference, inputs, ctx.needs_input_grad[:2], (dy,)), None)


_forward.register_autograd(_autograd, setup_context=_save)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x if x.dtype == torch.float64 else x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        # The last operator makes a new tensor. PyTorch 2.11 compiles a Function that ends in an
        # operator that returns its input (in place, or `to` its own dtype) to gradients of 0.
        out = wide * scale * weight
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            return _twice(ctx, dy)
        x, weight, scale = ctx.saved_tensors
        wide = x if x.dtype == torch.float64 else x.float()
        x_hat = wide * scale
        d_weight = (dy * x_hat).flatten(0, x.dim() - 1 - weight.dim()).sum(0)
        d_hat = dy * weight
        dot = torch.linalg.vecdot(d_hat, x_hat).unsqueeze(-1).div_(x.shape[-1])
        dx = d_hat.addcmul_(x_hat, dot, value=-1).mul_(scale)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None
