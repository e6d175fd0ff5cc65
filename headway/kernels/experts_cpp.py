"""Experts in the C++ of cpu/experts.cpp: packed weights and every intermediate of an expert in the
cache, float32 from the first product to the last rounding. Weights are stored in float32 or
bfloat16. See experts.py for the equations."""

import torch
from torch import Tensor

from headway.kernels.activation import ACTIVATIONS
from headway.kernels.cpp import cpp_kernels
from headway.kernels.paths import ExpertInputs


def forward(inputs: ExpertInputs, keep: bool) -> tuple[Tensor, Tensor]:
    """Return (out `[N, L]`, pre-activations `[R, G·F]`, or `[0, G·F]` unless `keep`)."""
    x, gate, w_in, w_out, slot_R, row_NK, counts_HE, activation = _contiguous(inputs)
    R, (_, _, G, Fh, L) = slot_R.numel(), w_in.shape
    y_RL = x.new_empty(R, L, dtype=torch.float32)
    pre_R = x.new_empty(R if keep else 0, G * Fh)
    tensors, sizes = (x, w_in, w_out, slot_R, counts_HE), _sizes(row_NK, w_in, activation)
    cpp_kernels().call("experts_forward", x.dtype, *tensors, *sizes, pre_R if keep else None, y_RL)
    return _combine(x, y_RL, row_NK, counts_HE, gate), pre_R


def backward(
    do_NL: Tensor, inputs: ExpertInputs, pre_R: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gates, w_in and w_out."""
    x, gate, w_in, w_out, slot_R, row_NK, counts_HE, activation = _contiguous(inputs)
    dx_RL = x.new_empty(slot_R.numel(), x.shape[1], dtype=torch.float32)
    d_gate, dw_in, dw_out = torch.zeros_like(gate), torch.empty_like(w_in), torch.empty_like(w_out)
    tensors = (x, do_NL, gate, w_in, w_out, slot_R, counts_HE)
    pre, sizes = pre_R if keep else None, _sizes(row_NK, w_in, activation)
    grads = (dx_RL, d_gate, dw_in, dw_out)
    cpp_kernels().call("experts_backward", x.dtype, *tensors, *sizes, pre, *grads)
    return _combine(x, dx_RL, row_NK, counts_HE, None), d_gate, dw_in, dw_out


def _contiguous(inputs: ExpertInputs) -> ExpertInputs:
    """Return the arguments as the kernels take them: contiguous, with int64 tables."""
    x, gate, w_in, w_out = (t.contiguous() for t in inputs[:4])
    slot_R, row_NK, counts_HE = (t.long() for t in inputs[4:7])
    return ExpertInputs(x, gate, w_in, w_out, slot_R, row_NK, counts_HE, inputs.activation)


def _sizes(row_NK: Tensor, w_in_HEGFL: Tensor, activation: str) -> tuple[int, ...]:
    """Return groups, K, L, F, G, the activation's number and whether weights are bfloat16."""
    H, E, G, Fh, L = w_in_HEGFL.shape
    number = ACTIVATIONS.index(activation)
    return H * E, row_NK.shape[1], L, Fh, G, number, int(w_in_HEGFL.dtype == torch.bfloat16)


def _combine(
    like: Tensor, y_RL: Tensor, row_NK: Tensor, counts_HE: Tensor, weight: Tensor | None
) -> Tensor:
    """Return Σ_k (weight ·) y[row] over the slots that have an expert; `[N, L]` as `like`."""
    out = torch.empty_like(like)
    sizes = (counts_HE.numel(), *row_NK.shape, like.shape[1])
    cpp_kernels().call("combine", like.dtype, y_RL, row_NK, weight, counts_HE, *sizes, out)
    return out
