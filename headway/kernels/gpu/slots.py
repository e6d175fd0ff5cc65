"""What kernels of experts write for every slot, and its sum over the K slots of a sub-token.

A block of rows stores each result once, at the place of its slot; the sum then reads contiguous
memory in a fixed order: no atomics. With bfloat16 tokens these rows are float16 with a float32
scale for each block of columns: the output is then off by 2.4e-3 from float64, where rows in
bfloat16 left 3.0e-3."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu import on
from headway.kernels.gpu.arith import narrow


@triton.jit
def put_rows(
    out, scale, slot, valid, cols, values, factor,
    L: tl.constexpr, BLOCKS: tl.constexpr = 1, block=0,
):  # fmt: skip
    """Store factor · `values [M, BL]`, block `block` of BLOCKS of columns, at the places of their
    slots: `out [N·K, L]` times `scale [N·K, BLOCKS]`. In float16 a row is divided by its largest
    value first: 11 bits of each value where bfloat16 has 8, for four bytes more per row."""
    if out.dtype.element_ty == tl.float16:
        largest = tl.max(tl.abs(values), 1)
        plain = (largest > 0) & (largest < float("inf"))  # else zeros, infinity or NaN: as they are
        largest = tl.where(plain, largest, 1.0)
        values = values / largest[:, None]
        factor *= largest
    inside = valid[:, None]
    if cols.shape[0] * BLOCKS != L:
        inside = inside & (cols < L)[None, :]
    to = out + slot.to(tl.int64)[:, None] * L + cols[None, :]
    tl.store(to, values.to(out.dtype.element_ty), mask=inside)
    tl.store(scale + slot.to(tl.int64) * BLOCKS + block, factor, mask=valid)


@triton.jit
def combine(y, scale, row, start, out, N, K, G, L: tl.constexpr, M: tl.constexpr, BL: tl.constexpr):
    """Compute out[n] = Σ_k scale[n, k] · y[n, k] in the order of the slots, a block of columns;
    slots whose row is past the last group have no expert and are not read."""
    n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    n_taken = tl.load(start + G)
    blocks: tl.constexpr = (L + BL - 1) // BL
    block = tl.program_id(1)
    cols = block * BL + tl.arange(0, BL)
    acc = tl.zeros([M, BL], tl.float32)
    for k in range(0, K):
        slot = n * K + k
        has_expert = tl.load(row + slot, mask=n < N, other=n_taken) < n_taken
        inside = has_expert[:, None] & (cols < L)[None, :]
        values = tl.load(y + slot[:, None] * L + cols[None, :], mask=inside, other=0.0)
        factor = tl.load(scale + slot * blocks + block, mask=has_expert, other=0.0)
        acc += values.to(tl.float32) * factor[:, None]
    inside = (n < N)[:, None] & (cols < L)[None, :]
    at = out + n[:, None] * L + cols[None, :]
    tl.store(at, narrow(acc, out.dtype.element_ty), mask=inside)


def padded(width: int) -> int:
    """Return a size that a tile can have: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(width))


def empty_rows(x_NL: Tensor, N: int, K: int, columns: int = 1) -> tuple[Tensor, Tensor]:
    """Allocate a row per slot `[N, K, L]` and a scale per block of columns `[N, K, columns]`."""
    dtype = torch.float16 if x_NL.dtype == torch.bfloat16 else torch.float32
    rows_NKL = x_NL.new_empty(N, K, x_NL.shape[1], dtype=dtype)
    return rows_NKL, x_NL.new_empty(N, K, columns, dtype=torch.float32)


def sum_slots(
    like_NL: Tensor, y_NKL: Tensor, scale: Tensor, row_NK: Tensor, start_G: Tensor, BL: int
) -> Tensor:
    """Return Σ_k scale · y over slots with an expert, `[N, L]`; BL columns have one scale."""
    N, K, L = y_NKL.shape
    out, G = torch.empty_like(like_NL), start_G.numel() - 1
    rows = max(1, 2048 // BL)
    with on(out):
        combine[(triton.cdiv(N, rows), triton.cdiv(L, BL))](
            y=y_NKL, scale=scale, row=row_NK, start=start_G, out=out, N=N, K=K, G=G, L=L,
            M=rows, BL=BL,
        )  # fmt: skip
    return out


def cast(w: Tensor, like: Tensor) -> Tensor:
    return w.to(like.dtype).contiguous()
