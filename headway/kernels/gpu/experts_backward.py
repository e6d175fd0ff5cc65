"""The backward kernels of narrow experts; both recompute the pre-activations. Equations in
../experts.py.

M rows of a tile · the hidden width is passed in chunks of BF · a row is padded to BL columns."""

import triton
import triton.language as tl

from headway.kernels.gpu.arith import dot, narrow, sigmoid
from headway.kernels.gpu.experts_forward import (
    hidden_rows,
    product,
    row_tile,
    unpaired,
    weight_tile,
)
from headway.kernels.gpu.slots import put_rows


@triton.jit
def slopes(first, up, ACTIVATION: tl.constexpr):
    """Return hid, ∂hid/∂first and ∂hid/∂up."""
    if ACTIVATION == "swiglu":
        s = sigmoid(first)
        silu = first * s
        return silu * up, (s + silu * (1.0 - s)) * up, silu
    if ACTIVATION == "relu2":
        positive = tl.where(first < 0, 0.0, first)
        return positive * positive, 2.0 * positive, positive
    normal = 0.5 * (1.0 + tl.erf(first * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * first * first)
    return first * normal, normal + first * density, first


@triton.jit
def paired(first, second, G: tl.constexpr, M: tl.constexpr, BF: tl.constexpr):
    """Undo `unpaired`."""
    if G == 2:
        both = tl.join(tl.reshape(first, [M, BF // 8, 8]), tl.reshape(second, [M, BF // 8, 8]))
        return tl.reshape(tl.permute(both, (0, 1, 3, 2)), [M, 2 * BF])
    else:
        return first


@triton.jit
def experts_backward_rows(
    d_out, x, gate, w_in, w_out, slots, start, group, first_row, d_gate, dx, scale, K,
    G: tl.constexpr, F: tl.constexpr, L: tl.constexpr, ACTIVATION: tl.constexpr,
    M: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Compute d_gate[slot] and dx·scale, not yet summed over slots, of a block of rows."""
    b = tl.program_id(0)
    g = tl.load(group + b)
    if g < 0:
        return
    row = tl.load(first_row + b) + tl.arange(0, M)
    valid = row < tl.load(start + g + 1)
    slot = tl.load(slots + row, mask=valid, other=0).to(tl.int32)
    cols = tl.arange(0, BL)
    x_tile = row_tile(x, slot // K, valid, cols, L)
    do_tile = row_tile(d_out, slot // K, valid, cols, L)
    gates = tl.load(gate + slot, mask=valid, other=0.0).to(tl.float32)
    w_in += g.to(tl.int64) * (G * F * L)
    w_out += g.to(tl.int64) * (F * L)
    d_gates = tl.zeros([M, BF], tl.float32)  # summed over its columns once, after the loop
    acc = tl.zeros([M, BL], tl.float32)
    for f0 in range(0, F, BF):
        row_in, live_in = hidden_rows(f0, F, G, BF)
        row_out, live_out = hidden_rows(f0, F, 1, BF)
        w = weight_tile(w_in, row_in, live_in, cols, F, L, BF)
        first, up = unpaired(product(x_tile, w, live_in, F, BF), G, M, BF)
        w_back = weight_tile(w_out, row_out, live_out, cols, F, L, BF)
        z = product(do_tile, w_back, live_out, F, BF)
        hid, d_first, d_up = slopes(first, up, ACTIVATION)
        d_gates += hid * z
        z *= gates[:, None]
        d_pre = paired(z * d_first, z * d_up, G, M, BF)
        acc = dot(narrow(d_pre, x_tile.dtype), w, acc)
    tl.store(d_gate + slot, tl.sum(d_gates, 1), mask=valid)
    put_rows(dx, scale, slot, valid, cols, acc, tl.full([M], 1.0, tl.float32), L)


@triton.jit
def experts_backward_weights(
    d_out, x, gate, w_in, w_out, slots, start, dw_in, dw_out, K,
    G: tl.constexpr, F: tl.constexpr, L: tl.constexpr, ACTIVATION: tl.constexpr,
    M: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one expert's weights, a chunk of the hidden width, summed over its
    rows in their order; zeros where it has none. Neighbouring chunks read the same rows."""
    g = tl.program_id(0) // tl.cdiv(F, BF)
    f0 = tl.program_id(0) % tl.cdiv(F, BF) * BF
    row_in, live_in = hidden_rows(f0, F, G, BF)
    row_out, live_out = hidden_rows(f0, F, 1, BF)
    cols = tl.arange(0, BL)
    end = tl.load(start + g + 1)
    at_in, at_out = g.to(tl.int64) * (G * F * L), g.to(tl.int64) * (F * L)
    w = weight_tile(w_in + at_in, row_in, live_in, cols, F, L, BF)
    w_back = weight_tile(w_out + at_out, row_out, live_out, cols, F, L, BF)
    # [BL, …], not […, BL]: Hopper multiplies tiles of 64 rows, and BF is smaller
    acc_in = tl.zeros([BL, G * BF], tl.float32)
    acc_out = tl.zeros([BL, BF], tl.float32)
    for r0 in range(tl.load(start + g), end, M):
        row = r0 + tl.arange(0, M)
        valid = row < end
        slot = tl.load(slots + row, mask=valid, other=0).to(tl.int32)
        x_tile = row_tile(x, slot // K, valid, cols, L)
        do_tile = row_tile(d_out, slot // K, valid, cols, L)
        gates = tl.load(gate + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
        first, up = unpaired(dot(x_tile, w.T), G, M, BF)
        z = gates * dot(do_tile, w_back.T)
        hid, d_first, d_up = slopes(first, up, ACTIVATION)
        d_pre = paired(z * d_first, z * d_up, G, M, BF)
        if x_tile.dtype == tl.float32:  # a fresh sum per tile: tensor cores add by truncation
            acc_out += dot(do_tile.T, gates * hid)
            acc_in += dot(x_tile.T, d_pre)
        else:
            acc_out = dot(do_tile.T, narrow(gates * hid, x_tile.dtype), acc_out)
            acc_in = dot(x_tile.T, narrow(d_pre, x_tile.dtype), acc_in)
    _put_weight(dw_in + at_in, row_in, live_in, cols, acc_in, L)
    _put_weight(dw_out + at_out, row_out, live_out, cols, acc_out, L)


@triton.jit
def _put_weight(w, row, live, cols, values_T, L: tl.constexpr):
    """Undo `weight_tile`, from `[BL, rows]`."""
    inside = live[:, None] & (cols < L)[None, :]
    at = w + row[:, None] * L + cols[None, :]
    tl.store(at, narrow(values_T.T, w.dtype.element_ty), mask=inside)
