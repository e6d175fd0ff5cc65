"""Narrow experts on the GPU: every intermediate of a block of rows stays on the chip.

Equations and arguments are in ../experts.py, the kernels in experts_forward.py and
experts_backward.py. An expert's rows are gathered, multiplied, activated, multiplied again and
stored once, at the place of their slot. Backward recomputes the pre-activations in both its
kernels: one owns rows (dx, d_gate), the other owns weights and walks over the rows of its expert.
No atomics, no host sync, nothing of size R×F in memory."""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from headway.config import Precision
from headway.kernels import gpu
from headway.kernels.gpu.blocks import blocks
from headway.kernels.gpu.experts_backward import experts_backward_rows, experts_backward_weights
from headway.kernels.gpu.experts_float8 import experts_forward_float8, quantize
from headway.kernels.gpu.experts_forward import experts_forward
from headway.kernels.gpu.slots import cast, empty_rows, padded, sum_slots
from headway.kernels.gpu.tune import Tiles, tiles
from headway.kernels.paths import ExpertInputs

KERNELS = ("forward", "backward_rows", "backward_weights")

BFLOAT16 = {
    32: (Tiles(128, 32, 8, 3), Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2)),
    64: (Tiles(128, 32, 8, 3), Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2)),
    128: (Tiles(64, 32, 4, 2), Tiles(64, 16, 4, 3), Tiles(64, 32, 4, 3)),
    256: (Tiles(128, 32, 8, 3),),
}
"""Padded L → the tiles of `KERNELS`, the fastest on an H100 at 64 and 128, and of the forward pass
at 256, whose backward is wide (docs/numbers): two or three programs on an SM hide waits."""

FLOAT32 = Tiles(32, 16, 4, 1)
"""Of every kernel: the TF32 parts of three products take registers, memory and stack."""

FLOAT8 = {
    32: Tiles(128, 64, 8, 2),
    64: Tiles(128, 64, 8, 2),
    128: Tiles(128, 32, 8, 2),
    256: Tiles(64, 32, 8, 2),
}
"""Of the forward kernel; a product of e4m3 sums over 32 values at least."""

AMPERE = {128: (*BFLOAT16[128][:2], Tiles(64, 16, 4, 2)), 256: (Tiles(128, 16, 8, 2),)}
"""bfloat16 where a block has 163 KiB of shared memory (capability 8.0, 8.7); 227 on Hopper."""

SMALL = {
    128: (Tiles(64, 32, 4, 2), Tiles(64, 16, 4, 2), Tiles(64, 16, 4, 2)),
    256: (Tiles(32, 16, 8, 1),),
}
"""bfloat16 where a block has 99 KiB of shared memory (capability 8.6, 8.9, 12.0)."""


def default_tiles(kernel: str, L: int, itemsize: int, capability: int = 90) -> Tiles:
    """Return the tiles of a kernel for a width and a device of this capability (90 for 9.0)."""
    if kernel == "forward_float8":
        return FLOAT8[max(32, padded(L))]
    if itemsize == 4:
        return FLOAT32
    match capability:
        case 80 | 87:
            table = BFLOAT16 | AMPERE
        case 86 | 89 | 120 | 121:
            table = BFLOAT16 | SMALL
        case _:
            table = BFLOAT16
    return table[max(32, padded(L))][KERNELS.index(kernel)]


def tile_of(kernel: str, L: int, G: int, F: int, itemsize: int) -> Tiles:
    """Return the tiles of a kernel for a shape; no wider than F."""
    default = default_tiles(kernel, L, itemsize, gpu.capability())
    best = tiles(f"experts_{kernel}", (L, G, F, itemsize), default)
    return replace(best, cols=min(best.cols, padded(F)))


def forward(inputs: ExpertInputs, precision: Precision = "bfloat16") -> tuple[Tensor, Tensor]:
    """Return (out `[N, L]`, no pre-activations `[0, G·F]`)."""
    x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE, activation = inputs
    x, gate = x_NL.contiguous(), gate_NK.contiguous()
    (N, K), (_, _, G, F, L) = row_NK.shape, w_in_HEGFL.shape
    if precision == "float8":
        cut = tile_of("forward_float8", L, G, F, 1)
        kernel, BF, BL = experts_forward_float8, max(32, cut.cols), max(32, padded(L))
        w_in_GFL = w_in_HEGFL.flatten(2, 3).flatten(0, 1)
        w_out_GLF = w_out_HEFL.flatten(0, 1).transpose(1, 2)
        w_in, in_scale = quantize(w_in_GFL)
        w_out_T, out_scale = quantize(w_out_GLF)
        weights = {"w_in": w_in, "in_scale": in_scale, "w_out_T": w_out_T, "out_scale": out_scale}
    else:
        cut = tile_of("forward", L, G, F, x.element_size())
        kernel, BF, BL = experts_forward, cut.cols, padded(L)
        weights = {"w_in": cast(w_in_HEGFL, x), "w_out": cast(w_out_HEFL, x)}
    table = blocks(counts_HE, slot_R.numel(), cut.rows)
    y_NKL, scale_NK = empty_rows(x, N, K)
    kernel[(table.group_B.numel(),)](
        x=x, gate=gate, **weights, slots=slot_R, **table.arguments(), y=y_NKL, scale=scale_NK,
        K=K, G=G, F=F, L=L, ACTIVATION=activation, M=cut.rows, BF=BF, BL=BL,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return sum_slots(x, y_NKL, scale_NK, row_NK, table.start_G, padded(L)), x.new_empty(0, G * F)


def backward(do_NL: Tensor, inputs: ExpertInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gates, w_in and w_out, in x's precision."""
    x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE, activation = inputs
    x, gate = x_NL.contiguous(), gate_NK.contiguous()
    w_in, w_out = cast(w_in_HEGFL, x), cast(w_out_HEFL, x)
    (N, K), (H, E, G, F, L) = row_NK.shape, w_in.shape
    tensors = {"d_out": do_NL, "x": x, "gate": gate, "w_in": w_in, "w_out": w_out, "slots": slot_R}
    sizes = {"K": K, "G": G, "F": F, "L": L, "ACTIVATION": activation, "BL": padded(L)}
    # of slots without an expert it stays 0
    d_gate = torch.zeros_like(gate, dtype=torch.float32)
    dw_in = torch.empty_like(w_in_HEGFL, memory_format=torch.contiguous_format)
    dw_out = torch.empty_like(w_out_HEFL, memory_format=torch.contiguous_format)
    dx_NKL, scale_NK = empty_rows(x, N, K)
    cut = tile_of("backward_rows", L, G, F, x.element_size())
    table = blocks(counts_HE, slot_R.numel(), cut.rows)
    experts_backward_rows[(table.group_B.numel(),)](
        **tensors, **table.arguments(), d_gate=d_gate, dx=dx_NKL, scale=scale_NK, **sizes,
        M=cut.rows, BF=cut.cols, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    cut = tile_of("backward_weights", L, G, F, x.element_size())
    experts_backward_weights[(triton.cdiv(F, cut.cols) * H * E,)](
        **tensors, start=table.start_G, dw_in=dw_in, dw_out=dw_out, **sizes,
        M=cut.rows, BF=cut.cols, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    dx = sum_slots(x, dx_NKL, scale_NK, row_NK, table.start_G, padded(L))
    return dx, d_gate.to(gate.dtype), dw_in, dw_out
