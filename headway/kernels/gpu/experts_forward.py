"""The forward kernel of narrow experts; equations in ../experts.py.

M rows of a tile · the hidden width is passed in chunks of BF · a row is padded to BL columns.
Shapes of the parameters, here and in experts_backward.py: `x`, `d_out`, `dx` [N, L] · `gate` [N·K]
· `w_in` [H·E, G·F, L] · `w_out` [H·E, F, L] · `slots` [R] · `start`, `group`, `first_row` as in
blocks.py · `y` [N·K, L] with `scale` [N·K] as in slots.py."""

import triton
import triton.language as tl

from headway.kernels.gpu.arith import dot, narrow, sigmoid
from headway.kernels.gpu.slots import put_rows


@triton.jit
def row_tile(x, token, valid, cols, L: tl.constexpr):
    """Gather rows of `x [N, L]`: `[M, BL]`, zeros outside."""
    inside = valid[:, None]
    if cols.shape[0] != L:
        inside = inside & (cols < L)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * L + cols[None, :], mask=inside, other=0.0)


@triton.jit
def hidden_rows(f0, F: tl.constexpr, G: tl.constexpr, BF: tl.constexpr):
    """Return the rows of a matrix `[G·F, L]` for BF hidden units from f0 on, and which of them
    exist. One product computes all G pre-activations of a unit; eight units' first rows come before
    their second ones:

        G = 2:  gate 0 … 7, up 0 … 7, gate 8 … 15, up 8 … 15, …

    A thread of a tensor core's accumulator holds the same columns of every eight, so it holds both
    pre-activations of a unit and nothing changes places between threads."""
    i = tl.arange(0, G * BF)
    f = f0 + i // (8 * G) * 8 + i % 8
    return (i // 8 % G) * F + f, f < F


@triton.jit
def weight_tile(w, row, live, cols, F: tl.constexpr, L: tl.constexpr, BF: tl.constexpr):
    """Load rows of a matrix of L columns, `[rows, BL]`, zeros outside."""
    at = w + row[:, None] * L + cols[None, :]
    if F % BF == 0 and cols.shape[0] == L:
        return tl.load(at)
    return tl.load(at, mask=live[:, None] & (cols < L)[None, :], other=0.0)


@triton.jit
def product(rows, w, live, F: tl.constexpr, BF: tl.constexpr):
    """Return rows·wᵀ; zeros past F, where inf · 0 would be NaN."""
    out = dot(rows, w.T)
    if F % BF == 0:
        return out
    return tl.where(live[None, :], out, 0.0)


@triton.jit
def unpaired(pre, G: tl.constexpr, M: tl.constexpr, BF: tl.constexpr):
    """Return the first and second pre-activations `[M, BF]` of `[M, G·BF]` in the order of
    `hidden_rows`; the same twice where there is one."""
    if G == 2:
        eights = tl.permute(tl.reshape(pre, [M, BF // 8, 2, 8]), (0, 1, 3, 2))
        first, second = tl.split(eights)
        first, second = tl.reshape(first, [M, BF]), tl.reshape(second, [M, BF])
    else:
        first = pre
        second = pre
    return first, second


@triton.jit
def activated(first, up, ACTIVATION: tl.constexpr):
    """Return the hidden units of one or two pre-activations."""
    if ACTIVATION == "swiglu":
        return first * sigmoid(first) * up
    if ACTIVATION == "relu2":
        positive = tl.where(first < 0, 0.0, first)  # unlike maximum, NaN stays
        return positive * positive
    return 0.5 * first * (1.0 + tl.erf(first * 0.7071067811865476))


@triton.jit
def experts_forward(
    x, gate, w_in, w_out, slots, start, group, first_row, y, scale, K,
    G: tl.constexpr, F: tl.constexpr, L: tl.constexpr, ACTIVATION: tl.constexpr,
    M: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Compute y·scale = gate · act(x·W_inᵀ)·W_out at the slots of one expert's block of rows."""
    b = tl.program_id(0)
    g = tl.load(group + b)
    if g < 0:
        return
    row = tl.load(first_row + b) + tl.arange(0, M)
    valid = row < tl.load(start + g + 1)
    slot = tl.load(slots + row, mask=valid, other=0).to(tl.int32)
    cols = tl.arange(0, BL)
    x_tile = row_tile(x, slot // K, valid, cols, L)
    w_in += g.to(tl.int64) * (G * F * L)
    w_out += g.to(tl.int64) * (F * L)
    acc = tl.zeros([M, BL], tl.float32)
    for f0 in range(0, F, BF):
        row_in, live_in = hidden_rows(f0, F, G, BF)
        row_out, live_out = hidden_rows(f0, F, 1, BF)
        pre = product(x_tile, weight_tile(w_in, row_in, live_in, cols, F, L, BF), live_in, F, BF)
        first, up = unpaired(pre, G, M, BF)
        hid = narrow(activated(first, up, ACTIVATION), x_tile.dtype)
        acc = dot(hid, weight_tile(w_out, row_out, live_out, cols, F, L, BF), acc)
    gates = tl.load(gate + slot, mask=valid, other=0.0).to(tl.float32)
    put_rows(y, scale, slot, valid, cols, acc, gates, L)
