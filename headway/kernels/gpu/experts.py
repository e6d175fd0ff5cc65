"""Narrow experts on the GPU: every intermediate of a block of rows stays on the chip.

Equations and arguments are in ../experts.py, the kernels in experts_forward.py and
experts_backward.py. An expert's rows are gathered, multiplied, activated, multiplied again and
stored once, at the place of their slot; the sum over slots then reads contiguous memory in a fixed
order. With bfloat16 tokens these rows are float16 with one float32 scale each: with rows in bfloat16
the error against float64 was 3.0e-3, with float32 they would be twice as large. Backward recomputes the pre-activations twice, once per kernel: one kernel
owns rows (dx, d_gate), the other owns weights and walks over its expert's rows. No atomics, no host
sync, nothing of size R×F in memory.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from headway.kernels.gpu import on
from headway.kernels.gpu.blocks import Blocks, blocks
from headway.kernels.gpu.experts_backward import experts_backward_rows, experts_backward_weights
from headway.kernels.gpu.experts_forward import combine, experts_forward
from headway.kernels.gpu.tune import Tiles, tiles


def default_tiles(kernel: str, L: int, G: int, itemsize: int) -> Tiles:
    """placeholder"""
    return Tiles(64, 32, 4, 2)


def forward(
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(out `[N, L]`, no pre-activations `[0, G·F]`)."""
    x, gate = x_NL.contiguous(), gate_NK.contiguous()
    w_in, w_out = _cast(w_in_HEGFL, x), _cast(w_out_HEFL, x)
    (N, K), (_, _, G, F, L) = row_NK.shape, w_in.shape
    cut = tile_of("forward", L, G, F, x.element_size())
    table = blocks(counts_HE, slot_R.numel(), cut.rows)
    y_NKL, scale_NK = _empty_rows(x, N, K)
    with on(x):
        experts_forward[(table.group_B.numel(),)](
            *(x, gate, w_in, w_out, slot_R, *table, y_NKL, scale_NK, K, F, L, activation),
            *(cut.rows, cut.cols, padded(L)),
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return _combine(x, y_NKL, scale_NK, row_NK, table), x.new_empty(0, G * F)


def backward(
    do_NL: Tensor,
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    pre_R: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, w_in and w_out."""
    x, gate = x_NL.contiguous(), gate_NK.contiguous()
    w_in, w_out = _cast(w_in_HEGFL, x), _cast(w_out_HEFL, x)
    (N, K), (H, E, G, F, L) = row_NK.shape, w_in.shape
    inputs, sizes = (do_NL, x, gate, w_in, w_out, slot_R), (K, F, L, activation)
    d_gate = torch.zeros_like(gate)  # of slots without an expert it stays 0
    dw_in = torch.empty_like(w_in_HEGFL, memory_format=torch.contiguous_format)
    dw_out = torch.empty_like(w_out_HEFL, memory_format=torch.contiguous_format)
    dx_NKL, scale_NK = _empty_rows(x, N, K)
    with on(x):
        cut = tile_of("backward_rows", L, G, F, x.element_size())
        table = blocks(counts_HE, slot_R.numel(), cut.rows)
        experts_backward_rows[(table.group_B.numel(),)](
            *(*inputs, *table, d_gate, dx_NKL, scale_NK, *sizes),
            *(cut.rows, cut.cols, padded(L)),
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
        cut = tile_of("backward_weights", L, G, F, x.element_size())
        experts_backward_weights[(H * E * triton.cdiv(F, cut.cols),)](
            *(*inputs, table.start_G, dw_in, dw_out, *sizes),
            *(cut.rows, cut.cols, padded(L)),
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return _combine(x, dx_NKL, scale_NK, row_NK, table), d_gate, dw_in, dw_out


def tile_of(kernel: str, L: int, G: int, F: int, itemsize: int) -> Tiles:
    """The tiles of a kernel for a shape; no wider than F."""
    found = tiles(f"experts_{kernel}", (L, G, F, itemsize), default_tiles(kernel, L, G, itemsize))
    return replace(found, cols=min(found.cols, padded(F)))


def padded(width: int) -> int:
    """A power of two, 16 at least: what a tile can be."""
    return max(16, triton.next_power_of_2(width))


def _empty_rows(x_NL: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Memory for a row of each slot `[N, K, L]`, and its scale `[N, K]`."""
    dtype = torch.float16 if x_NL.dtype == torch.bfloat16 else torch.float32
    rows_NKL = x_NL.new_empty(N, K, x_NL.shape[1], dtype=dtype)
    return rows_NKL, x_NL.new_empty(N, K, dtype=torch.float32)


def _combine(
    like_NL: Tensor, y_NKL: Tensor, scale_NK: Tensor, row_NK: Tensor, table: Blocks
) -> Tensor:
    """Σ_k scale · y over the slots that have an expert; `[N, L]`."""
    N, K, L = y_NKL.shape
    out, G = torch.empty_like(like_NL), table.start_G.numel() - 1
    rows = max(1, 4096 // padded(L))
    with on(out):
        sizes = (N, K, G, L, rows, padded(L))
        combine[(triton.cdiv(N, rows),)](y_NKL, scale_NK, row_NK, table.start_G, out, *sizes)
    return out


def _cast(w: Tensor, like: Tensor) -> Tensor:
    return w.to(like.dtype).contiguous()
