"""RMSNorm with a hand-written backward, statistics in float32: one pass over memory each way in
`cpu/pointwise.cpp`, four in PyTorch instead of autograd's nine.
"""

import torch
from torch import Tensor

from headway.kernels.cpp import cpp_kernels, undispatched
from headway.kernels.differentiate import reference_grads, transformed
from headway.kernels.precision import widen


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) · weight over the last dim; `weight` broadcasts from the
    right (arXiv 1910.07467)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what `rms_norm_reference` does: `x [..., L]`, `weight [L]` or one per head `[H,
    L]`."""
    if transformed():
        return rms_norm_reference(x, weight, eps)
    weight = widen(weight)  # a row or a few; its gradient is rounded once
    if cpp_kernels().supports(x, weight) and weight.dtype == torch.float32:
        return (_norm if undispatched(x) else _forward)(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (out, 1/sqrt(mean(x²) + eps) of every row, float32 `[...]`)."""
    assert x.shape[-weight.dim() :] == weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    L = weight.shape[-1]
    heads = weight.numel() // L
    cpp_kernels().call("norm", x.dtype, x, weight, scale.numel(), heads, L, eps, out, scale)
    return out, scale


_forward = torch.library.custom_op("headway::rms_norm", _norm, mutates_args=())


@torch.library.custom_op("headway::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx, d_weight = torch.empty_like(x), torch.empty_like(weight)
    L = weight.shape[-1]
    sizes = (scale.numel(), weight.numel() // L, L)
    cpp_kernels().call("norm_backward", x.dtype, dy, x, weight, scale, *sizes, dx, d_weight)
    return dx, d_weight


@_forward.register_fake
def _(x, weight, eps):
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), scale


@_backward.register_fake
def _(dy, x, weight, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the output that is only kept
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1])


def _autograd(ctx, dy, _):
    if dy is None:  # PyTorch may ask without a gradient
        return None, None, None
    if torch.is_grad_enabled():
        return _twice(ctx, dy)
    return (*_backward(dy, *ctx.saved_tensors), None)


def _twice(ctx, dy: Tensor) -> tuple:
    """Return gradients that can be differentiated again."""
    x, weight, _ = ctx.saved_tensors

    def reference(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (rms_norm_reference(x, weight, ctx.eps),)

    return (*reference_grads(reference, (x, weight), ctx.needs_input_grad[:2], (dy,)), None)


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
