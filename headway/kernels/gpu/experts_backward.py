"""The backward kernels of narrow experts; both recompute the pre-activations. Equations in
../experts.py.

M rows of a tile · the hidden width is passed in chunks of BF · a row is padded to BL columns.
"""

import triton
import triton.language as tl

from headway.kernels.gpu.arith import dot, narrow
from headway.kernels.gpu.experts_forward import product, put_rows, row_tile, sigmoid, weight_tile


@triton.jit
def slopes(first, up, ACTIVATION: tl.constexpr):
    """hid, ∂hid/∂first and ∂hid/∂up."""
    if ACTIVATION == "swiglu":
        s = sigmoid(first)
        silu = first * s
        return silu * up, (s + silu * (1.0 - s)) * up, silu
    if ACTIVATION == "relu2":
        kept = tl.where(first < 0, 0.0, first)
        return kept * kept, 2.0 * kept, kept
    normal = 0.5 * (1.0 + tl.erf(first * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * first * first)
    return first * normal, normal + first * density, first


@triton.jit
def experts_backward_rows(
    d_out,
    x,
    gate,
    w_in,
    w_out,
    slots,
    start,
    group,
    first_row,
    d_gate,
    dx,
    scale,
    K,
    F: tl.constexpr,
    L: tl.constexpr,
    ACTIVATION: tl.constexpr,
    M: tl.constexpr,
    BF: tl.constexpr,
    BL: tl.constexpr,
):
    """One block of rows of one expert: d_gate[slot] and, before the sum over slots, dx · scale."""
    b = tl.program_id(0)
    g = tl.load(group + b)
    if g < 0:
        return
    G: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    row = tl.load(first_row + b) + tl.arange(0, M)
    valid = row < tl.load(start + g + 1)
    slot = tl.load(slots + row, mask=valid, other=0).to(tl.int32)
    cols = tl.arange(0, BL)
    x_tile = row_tile(x, slot // K, valid, cols, L)
    do_tile = row_tile(d_out, slot // K, valid, cols, L)
    gates = tl.load(gate + slot, mask=valid, other=0.0).to(tl.float32)
    w_in += g.to(tl.int64) * (G * F * L)
    w_out += g.to(tl.int64) * (F * L)
    found = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BL], tl.float32)
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        w_first = weight_tile(w_in, f, cols, F, L, BF)
        first = product(x_tile, w_first, f, F, BF)
        up = first
        w_up = w_first
        if G == 2:
            w_up = weight_tile(w_in + F * L, f, cols, F, L, BF)
            up = product(x_tile, w_up, f, F, BF)
        z = product(do_tile, weight_tile(w_out, f, cols, F, L, BF), f, F, BF)
        hid, d_first, d_up = slopes(first, up, ACTIVATION)
        found += tl.sum(hid * z, 1)
        z *= gates[:, None]
        acc = dot(narrow(z * d_first, x_tile.dtype), w_first, acc)
        if G == 2:
            acc = dot(narrow(z * d_up, x_tile.dtype), w_up, acc)
    tl.store(d_gate + slot, found, mask=valid)
    put_rows(dx, scale, slot, valid, cols, acc, tl.full([M], 1.0, tl.float32), L)


@triton.jit
def experts_backward_weights(
    d_out,
    x,
    gate,
    w_in,
    w_out,
    slots,
    start,
    dw_in,
    dw_out,
    K,
    F: tl.constexpr,
    L: tl.constexpr,
    ACTIVATION: tl.constexpr,
    M: tl.constexpr,
    BF: tl.constexpr,
    BL: tl.constexpr,
):
    """One chunk of the hidden width of one expert: its weights' gradients, summed over the expert's
    rows in their order; zeros where it has none."""
    G: tl.constexpr = 2 if ACTIVATION == "swiglu" else 1
    # Hopper multiplies tiles of 64 rows: the larger of BL and BF becomes the rows
    ACROSS: tl.constexpr = BL > BF
    n_chunks: tl.constexpr = (F + BF - 1) // BF
    g = tl.program_id(0) // n_chunks
    f = (tl.program_id(0) % n_chunks) * BF + tl.arange(0, BF)
    cols = tl.arange(0, BL)
    end = tl.load(start + g + 1)
    at_in, at_out = g.to(tl.int64) * (G * F * L), g.to(tl.int64) * (F * L)
    w_first = weight_tile(w_in + at_in, f, cols, F, L, BF)
    w_up = w_first
    if G == 2:
        w_up = weight_tile(w_in + at_in + F * L, f, cols, F, L, BF)
    w_back = weight_tile(w_out + at_out, f, cols, F, L, BF)
    if ACROSS:
        dw_first = tl.zeros([BL, BF], tl.float32)
    else:
        dw_first = tl.zeros([BF, BL], tl.float32)
    dw_up = dw_first
    dw_back = dw_first
    for r0 in range(tl.load(start + g), end, M):
        row = r0 + tl.arange(0, M)
        valid = row < end
        slot = tl.load(slots + row, mask=valid, other=0).to(tl.int32)
        x_tile = row_tile(x, slot // K, valid, cols, L)
        do_tile = row_tile(d_out, slot // K, valid, cols, L)
        gates = tl.load(gate + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
        first = dot(x_tile, w_first.T)
        up = first
        if G == 2:
            up = dot(x_tile, w_up.T)
        z = gates * dot(do_tile, w_back.T)
        hid, d_first, d_up = slopes(first, up, ACTIVATION)
        dw_back = _add_outer(dw_back, do_tile, narrow(gates * hid, x_tile.dtype), ACROSS)
        dw_first = _add_outer(dw_first, x_tile, narrow(z * d_first, x_tile.dtype), ACROSS)
        if G == 2:
            dw_up = _add_outer(dw_up, x_tile, narrow(z * d_up, x_tile.dtype), ACROSS)
    _put_weight(dw_in + at_in, f, cols, dw_first, F, L, ACROSS)
    if G == 2:
        _put_weight(dw_in + at_in + F * L, f, cols, dw_up, F, L, ACROSS)
    _put_weight(dw_out + at_out, f, cols, dw_back, F, L, ACROSS)


@triton.jit
def _add_outer(acc, rows_L, rows_F, ACROSS: tl.constexpr):
    """acc plus the sum over rows of `rows_F [M, BF]` times `rows_L [M, BL]`; `[BL, BF]` if ACROSS,
    else `[BF, BL]`."""
    if ACROSS:
        return dot(rows_L.T, rows_F, acc)
    return dot(rows_F.T, rows_L, acc)


@triton.jit
def _put_weight(w, f, cols, values, F: tl.constexpr, L: tl.constexpr, ACROSS: tl.constexpr):
    """The inverse of `weight_tile`."""
    if ACROSS:
        values = values.T
    inside = (f < F)[:, None] & (cols < L)[None, :]
    at = w + f[:, None] * L + cols[None, :]
    tl.store(at, narrow(values, w.dtype.element_ty), mask=inside)
