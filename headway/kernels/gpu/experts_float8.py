"""The forward pass of narrow experts with products in float8 (e4m3); backward stays in bfloat16.

e4m3 has 4 significant bits and reaches 448, so every operand is divided by a float32 scale first:
tokens by their row's largest value over 448, W_in by that of each hidden unit's row, W_out by that
of each column, the hidden units by that of a row's chunk, on the chip. Sums are float32. Scales
follow the values: multiplying the inputs by a power of two changes nothing else. A row with an
infinity becomes NaN. Equations in ../experts.py, arguments as in experts_forward.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu.arith import dot_float8, encode_float8, narrow_float8, widen
from headway.kernels.gpu.experts_forward import activated, hidden_rows, row_tile, unpaired
from headway.kernels.gpu.slots import padded, put_rows

LARGEST = tl.constexpr(448.0)


@triton.jit
def quantize_rows(
    w,  # [groups, R, C] by strides, float32 or bfloat16
    q,  # [groups, R, C] contiguous, the bytes of e4m3
    scale,  # [groups, R] float32
    R, stride_g, stride_r, stride_c,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Quantise BR rows of one group by their largest value, in one pass over memory: where a row is
    longer than BC, its second read comes from the cache."""
    g = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BC)
    w += g * stride_g
    largest = tl.zeros([BR], tl.float32)
    for c0 in range(0, C, BC):
        inside = (row < R)[:, None] & (c0 + column < C)[None, :]
        at = row[:, None] * stride_r + (c0 + column)[None, :] * stride_c
        values = widen(tl.load(w + at, mask=inside, other=0.0))
        largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
    row_scale = tl.where(largest > 0, tl.div_rn(largest, LARGEST), 1.0)
    for c0 in range(0, C, BC):
        inside = (row < R)[:, None] & (c0 + column < C)[None, :]
        at = row[:, None] * stride_r + (c0 + column)[None, :] * stride_c
        values = widen(tl.load(w + at, mask=inside, other=0.0))
        to = (g * R + row)[:, None] * C + (c0 + column)[None, :]
        tl.store(q + to, encode_float8(tl.div_rn(values, row_scale[:, None])), mask=inside)
    tl.store(scale + g * R + row, row_scale, mask=row < R)


def quantize(w_GRC: Tensor) -> tuple[Tensor, Tensor]:
    """Return `w_GRC` in e4m3, contiguous `[G, R, C]`, and the float32 scale of each row `[G, R]`:
    its largest magnitude over 448. `w_GRC` may have any strides: W_out is read transposed."""
    G, R, C = w_GRC.shape
    q = w_GRC.new_empty(G, R, C, dtype=torch.float8_e4m3fn)
    scale = w_GRC.new_empty(G, R, dtype=torch.float32)
    stride_g, stride_r, stride_c = w_GRC.stride()
    BC = min(256, padded(C))
    quantize_rows[(triton.cdiv(R, 32), G)](
        w_GRC, q.view(torch.uint8), scale, R=R, stride_g=stride_g, stride_r=stride_r,
        stride_c=stride_c, C=C, BR=32, BC=BC, num_warps=4,
    )  # fmt: skip
    return q, scale


@triton.jit
def _scale(x):
    """Return the float32 scale of each row: 1 for zeros, NaN where a value is infinite."""
    largest = tl.max(tl.abs(x), 1)
    scale = tl.where(largest > 0, largest * (1.0 / LARGEST), 1.0)
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def _tile(w, row, live, col, inside, stride):
    """Load `w [.., stride]` at rows × columns, zeros outside."""
    at = w + row[:, None] * stride + col[None, :]
    return tl.load(at, mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit
def experts_forward_float8(
    x, gate, w_in, in_scale, w_out_T, out_scale, slots, start, group, first_row, y, scale, K,
    G: tl.constexpr, F: tl.constexpr, L: tl.constexpr, ACTIVATION: tl.constexpr,
    M: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Compute a block of rows. W_out is transposed: Hopper sums along contiguous dims."""
    b = tl.program_id(0)
    g = tl.load(group + b)
    if g < 0:
        return
    row = tl.load(first_row + b) + tl.arange(0, M)
    valid = row < tl.load(start + g + 1)
    slot = tl.load(slots + row, mask=valid, other=0).to(tl.int32)
    cols = tl.arange(0, BL)
    inside = cols < L
    wide = widen(row_tile(x, slot // K, valid, cols, L))
    x_scale = _scale(wide)[:, None]
    x_tile = narrow_float8(wide / x_scale)
    w_in += g.to(tl.int64) * (G * F * L)
    w_out_T += g.to(tl.int64) * (F * L)
    in_scale += g.to(tl.int64) * (G * F)
    acc = tl.zeros([M, BL], tl.float32)
    for f0 in range(0, F, BF):
        row_in, live_in = hidden_rows(f0, F, G, BF)
        row_out, live_out = hidden_rows(f0, F, 1, BF)
        w = _tile(w_in, row_in, live_in, cols, inside, L)
        pre = dot_float8(x_tile, w.T, BL) * x_scale
        pre *= tl.load(in_scale + row_in, mask=live_in, other=0.0)[None, :]
        pre = tl.where(live_in[None, :], pre, 0.0)  # NaN · 0 past F
        first, up = unpaired(pre, G, M, BF)
        hid = activated(first, up, ACTIVATION)
        hid_scale = _scale(hid)[:, None]
        w_T = _tile(w_out_T, cols, inside, row_out, live_out, F)
        acc += dot_float8(narrow_float8(hid / hid_scale), w_T.T, BF) * hid_scale
    acc *= tl.load(out_scale + g.to(tl.int64) * L + cols, mask=inside, other=0.0)[None, :]
    gates = tl.load(gate + slot, mask=valid, other=0.0).to(tl.float32)
    put_rows(y, scale, slot, valid, cols, acc, gates, L)
