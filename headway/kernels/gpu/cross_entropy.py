"""Cross-entropy of rows of logits, and its gradient in their place; equations in
../cross_entropy.py.

One program per row goes over the vocabulary twice: the first pass sums exponentials as it goes
(their maximum changes the sum so far), the second writes the gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu import on
from headway.kernels.gpu.arith import narrow, sigmoid, widen

BLOCK = 4096
"""Logits of a row that are in registers at once."""


@triton.jit
def _capped(z, cap, CAPPED: tl.constexpr):
    """Return cap·tanh(z/cap)."""
    if CAPPED:
        return cap * (2.0 * sigmoid(2.0 * z / cap) - 1.0)
    else:
        return z


@triton.jit
def cross_entropy_rows(
    logits, targets, losses, V, cap, BLOCK: tl.constexpr, CAPPED: tl.constexpr, BACK: tl.constexpr
):
    """Compute the loss of a row, 0 without a target, and with BACK write the row's gradient."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    target = tl.load(targets + row).to(tl.int32)
    col = tl.arange(0, BLOCK)
    most, mass, picked = -float("inf"), 0.0, 0.0
    for v0 in range(0, V, BLOCK):
        v = v0 + col
        z = _capped(widen(tl.load(logits + v, mask=v < V, other=0.0)), cap, CAPPED)
        z = tl.where(v < V, z, -float("inf"))
        greater = tl.maximum(most, tl.max(z, 0))
        shift = tl.where(tl.abs(greater) == float("inf"), 0.0, greater)
        mass = mass * tl.exp(most - shift) + tl.sum(tl.exp(z - shift), 0)
        picked += tl.sum(tl.where(v == target, z, 0.0), 0)
        most = greater
    lse = tl.where(tl.abs(most) == float("inf"), 0.0, most) + tl.log(mass)
    lse = tl.where(target < V, lse, float("nan"))
    valid = target >= 0
    tl.store(losses + row, tl.where(valid, lse - picked, 0.0))
    if BACK:
        for v0 in range(0, V, BLOCK):
            v = v0 + col
            raw = widen(tl.load(logits + v, mask=v < V, other=0.0))
            z = _capped(raw, cap, CAPPED)
            d = tl.exp(z - lse) - tl.where(v == target, 1.0, 0.0)
            if CAPPED:
                d = d * (1.0 - (z / cap) * (z / cap))
            d = tl.where(valid, d, 0.0)
            tl.store(logits + v, narrow(d, logits.dtype.element_ty), mask=v < V)


def rows(logits_TV: Tensor, target_T: Tensor, softcap: float, back: bool) -> Tensor:
    """Return the loss of every row, float32 `[T]`; with `back` the logits become their gradient."""
    T, V = logits_TV.shape
    loss_T = logits_TV.new_empty(T, dtype=torch.float32)
    if T:
        with on(logits_TV):
            cross_entropy_rows[(T,)](
                logits=logits_TV, targets=target_T, losses=loss_T, V=V, cap=softcap or 1.0,
                BLOCK=min(BLOCK, max(16, triton.next_power_of_2(V))), CAPPED=bool(softcap),
                BACK=back, num_warps=8,
            )  # fmt: skip
    return loss_T
