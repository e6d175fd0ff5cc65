"""Backward of routing: the gradient of the logits is recomputed tile by tile, on chip, and goes
straight into the two products that need it. Each block of 128 columns of a product recomputes it.

    d_logits[t, e] = Σ_j ds[t, j]·[e = index[t, j]] + dense[t, e]
    dx_t = Σ_h Σ_e d_logits[t, h, e]·w[h, e];   dw[h, e] = Σ_t d_logits[t, h, e]·x[t, h]

The dense part is that of the balance loss and the z-loss, and the normaliser of `softmax_topk`; it
needs the scores a second time. Without it nothing but K comparisons per element is left. The two
products run on the tensor cores over all experts, and x is read once per chunk of 32 experts: no
more than a row per slot up to about E = 50·K. Beyond, a gradient without a dense part goes by slots
(route_sparse.py).

Tokens normalised by a softmax (p, gradient dp of the normalised scores): dense = p·(dp − c). By
their sum (`sigmoid`): dense = p·(1 − σ)·(dp − c) + softmax·2·dz·logsumexp. c is a number per row.

    _slots      tiles of tokens            gates, scores → ds [T, H, K], c [T, H]
    _d_tokens   tiles of tokens × columns  d_logits (on chip) · w   → dx
    _d_weights  experts × columns          d_logitsᵀ (on chip) · x  → part [programs, H, E, L] → dw

No atomics; sums over tokens are partial sums per program, then added in the programs' order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu import route_sparse
from headway.kernels.gpu.arith import dot_close, dot_rounded, dot_split, narrow, sigmoid, split
from headway.kernels.gpu.ops import GATES
from headway.kernels.gpu.scores import (
    fitting,
    launch,
    load_w,
    load_x,
    normalised,
    scores,
    split_w,
    strides,
    walks,
    width,
)


@triton.jit
def _slots(
    x, parts, saved, rows, d_gate, d_prob, d_z, ds, c,
    T, H, E, L, stride_t, stride_h, stride_l, scale, per_token,
    K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    GATE: tl.constexpr, RENORMALIZE: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Compute `ds [T, H, K]`, gradients of chosen logits through the gates only, and `c [T, H]`."""
    t, h = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1)
    SIGMOID: tl.constexpr = GATE == 2
    row, slot = t.to(tl.int64) * H + h, tl.arange(0, BK)
    taken = (t < T)[:, None] & (slot < K)[None, :]
    slots = row[:, None] * K + slot[None, :]
    lse = tl.load(rows + row, mask=t < T, other=0.0)
    total = lse
    if SIGMOID:
        total = tl.load(rows + T * H + row, mask=t < T, other=1.0)
    c_row = tl.full((BT,), 0.0, tl.float32)
    if d_gate is not None:
        d = tl.load(d_gate + slots, mask=taken, other=0.0) * scale
        saved_k = tl.load(saved + slots, mask=taken, other=0.0)
        if GATE == 0:
            p_k = saved_k / scale
            d = p_k * (d - tl.sum(p_k * d, 1)[:, None])
        else:
            p_k = sigmoid(saved_k) if SIGMOID else normalised(saved_k, lse, lse, False)
            p_k = tl.where(taken, p_k, 0.0)
            if RENORMALIZE:
                chosen = tl.sum(p_k, 1)[:, None]
                inner = tl.sum(p_k * d, 1)[:, None] / chosen
                d = tl.where(chosen < 1e-20, d * 1e20, (d - inner) / chosen)
            d = p_k * d
            if SIGMOID:
                d = d * sigmoid(-saved_k)
            else:
                c_row += tl.sum(d, 1)
        tl.store(ds + slots, d, mask=taken)
    if c is not None:
        if d_prob is not None:
            x += h.to(tl.int64) * stride_h
            inner = tl.full((BT,), 0.0, tl.float32)
            for e0 in range(0, E, BE):
                e = e0 + tl.arange(0, BE)
                s = scores(x, parts, t, T, h, e, H, E, L, stride_t, stride_l, BL, ONCE, True)
                dp = tl.load(d_prob + h * E + e, mask=e < E, other=0.0) * per_token
                p = tl.where((e < E)[None, :], normalised(s, lse, total, SIGMOID), 0.0)
                inner += tl.sum(p * dp[None, :], 1)
            if SIGMOID:
                inner = tl.where(total < 1e-20, 0.0, inner)
            c_row += inner
        if d_z is not None and not SIGMOID:
            c_row -= 2 * per_token * tl.load(d_z + h) * lse
        tl.store(c + row, c_row, mask=t < T)


@triton.jit
def _d_logits(
    x, parts, index, ds, rows, c, d_prob, d_z, t, h, e,
    T, H, E, L, stride_t, stride_l, per_token,
    K: tl.constexpr, BL: tl.constexpr, SIGMOID: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a tile of logits, `[BT, BE]` float32; 0 beyond the ends. Without `ds`
    the gates have no gradient, without `c` there is no dense part."""
    row = t.to(tl.int64) * H + h
    d = tl.full((t.shape[0], e.shape[0]), 0.0, tl.float32)
    if ds is not None:
        for j in range(K):  # unrolled, the loads of all slots would be under way in registers
            at = tl.load(index + row * K + j, mask=t < T, other=-1)
            at = tl.where(at < E, at, -1)  # no expert: no column, not even beyond the end
            value = tl.load(ds + row * K + j, mask=t < T, other=0.0)
            d += tl.where(at[:, None] == e[None, :], value[:, None], 0.0)
    if c is not None:
        s = scores(x, parts, t, T, h, e, H, E, L, stride_t, stride_l, BL, ONCE, True)
        lse = tl.load(rows + row, mask=t < T, other=0.0)
        away = tl.load(c + row, mask=t < T, other=0.0)
        away = -away[:, None]
        if d_prob is not None:
            away += tl.load(d_prob + h * E + e, mask=e < E, other=0.0)[None, :] * per_token
        if SIGMOID:
            total = tl.load(rows + T * H + row, mask=t < T, other=1.0)
            d += normalised(s, lse, total, True) * sigmoid(-s) * away
            if d_z is not None:
                pull = 2 * per_token * tl.load(d_z + h) * lse
                d += normalised(s, lse, lse, False) * pull[:, None]
        else:
            d += normalised(s, lse, lse, False) * away
        d = tl.where((t < T)[:, None] & (e < E)[None, :], d, 0.0)
    return d


@triton.jit
def _d_tokens(
    x, parts, index, ds, rows, c, d_prob, d_z, dx,
    T, H, E, L, stride_t, stride_h, stride_l, per_token, dx_t, dx_h, heads,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    BC: tl.constexpr, SIGMOID: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a tile of tokens, some of its columns: over one head's experts, or
    over those of all heads that read the same token."""
    t, l0 = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(2) * BC
    acc = tl.full((BT, BC), 0.0, tl.float32)
    h0 = tl.program_id(1) * heads
    for i in range(heads):
        h = h0 + i
        xh = x + h.to(tl.int64) * stride_h
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            d = _d_logits(
                xh, parts, index, ds, rows, c, d_prob, d_z, t, h, e,
                T, H, E, L, stride_t, stride_l, per_token, K, BL, SIGMOID, ONCE,
            )  # fmt: skip
            w0 = load_w(parts, 0, h, e, H, E, l0, L, BC)
            w1 = load_w(parts, 1, h, e, H, E, l0, L, BC)
            if x.dtype.element_ty == tl.bfloat16:
                acc = dot_rounded(d, w0, w1, acc)
            else:
                acc += dot_split(d, w0, w1, load_w(parts, 2, h, e, H, E, l0, L, BC))
    column = l0 + tl.arange(0, BC)
    at = dx + t.to(tl.int64)[:, None] * dx_t + tl.program_id(1) * dx_h + column[None, :]
    tl.store(at, narrow(acc, dx.dtype.element_ty), mask=(t < T)[:, None] & (column < L)[None, :])


@triton.jit
def _d_weights(
    x, parts, index, ds, rows, c, d_prob, d_z, dw,
    T, H, E, L, stride_t, stride_h, stride_l, per_token, walk, columns,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    BC: tl.constexpr, SIGMOID: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Compute a program's part of the gradient of one chunk of a head's weights, some of its
    columns, over the tiles of tokens it iterates over; `dw [programs, H, E, L]`. Beside tokens in
    bfloat16 two parts of the gradient are multiplied (2⁻¹⁷)."""
    program, h, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    e = block // columns * BE + tl.arange(0, BE)
    l0 = block % columns * BC
    x += h.to(tl.int64) * stride_h
    # [BC, BE], not [BE, BC]: Hopper multiplies tiles of 64 rows, and BE may be smaller
    acc = tl.full((BC, BE), 0.0, tl.float32)
    for tile in range(program * walk, tl.minimum((program + 1) * walk, (T + BT - 1) // BT)):
        t = tile * BT + tl.arange(0, BT)
        xt = load_x(x, t, T, l0, L, stride_t, stride_l, BC)
        d0, d1, d2 = split(
            _d_logits(
                x, parts, index, ds, rows, c, d_prob, d_z, t, h, e,
                T, H, E, L, stride_t, stride_l, per_token, K, BL, SIGMOID, ONCE,
            )
        )  # fmt: skip
        if xt.dtype == tl.bfloat16:
            acc += dot_close(tl.trans(xt), d0, d1)
        else:
            acc += dot_split(tl.trans(xt), d0, d1, d2)
    column = l0 + tl.arange(0, BC)
    at = ((program * H + h).to(tl.int64) * E + e)[None, :] * L + column[:, None]
    tl.store(dw + at, acc, mask=(e < E)[None, :] & (column < L)[:, None])


def backward(
    x: Tensor,
    w_HEL: Tensor,
    index_THK: Tensor,
    saved_THK: Tensor,
    rows_CTH: Tensor,
    d_gate_THK: Tensor | None,
    d_prob_HE: Tensor | None,
    d_z_H: Tensor | None,
    gate: str,
    renormalize: bool,
    scale: float,
    dx: Tensor,
    dw_HEL: Tensor,
) -> None:
    """Fill the gradients of the tokens and of the weights."""
    (H, E, L), (T, _, K) = w_HEL.shape, index_THK.shape
    gated = d_gate_THK is not None
    dense = d_prob_HE is not None or d_z_H is not None or (gated and gate == "softmax_topk")
    if T == 0 or not (gated or dense):
        dx.zero_()
        dw_HEL.zero_()
        return
    grads = (d_gate_THK, d_prob_HE, d_z_H)
    d_gate, d_prob, d_z = (None if d is None else d.contiguous() for d in grads)
    ds = x.new_empty(T, H, K, dtype=torch.float32) if gated else None
    c = x.new_empty(T, H, dtype=torch.float32) if dense else None
    BL, BC = width(L, 64), width(L, 128)
    columns = triton.cdiv(L, BC)
    sizes = {"T": T, "H": H, "E": E, "L": L, **strides(x), "per_token": 1 / T}
    sizes |= {"K": K, "BL": BL, "ONCE": L <= BL}
    cut, dx_cut, dw_cut = (fitting(f"route_{name}", x, w_HEL) for name in ("slots", "dx", "dw"))
    by_slots = not dense and T * H * K < 2**31  # what a sort takes
    by_slots = by_slots and route_sparse.reads_less(E, L, K, x.element_size(), dx_cut, dw_cut)
    parts = None if by_slots else split_w(w_HEL)
    _slots[(triton.cdiv(T, cut.rows), H)](
        x=x, parts=parts, saved=saved_THK, rows=rows_CTH, d_gate=d_gate, d_prob=d_prob, d_z=d_z,
        ds=ds, c=c, **sizes, scale=scale, BK=triton.next_power_of_2(K), GATE=GATES.index(gate),
        RENORMALIZE=renormalize, **launch(cut),
    )  # fmt: skip
    if by_slots:
        route_sparse.backward(x, w_HEL, index_THK, ds, dx, dw_HEL)
        return
    arguments = {"x": x, "parts": parts, "index": index_THK, "ds": ds, "rows": rows_CTH, "c": c}
    arguments |= {"d_prob": d_prob, "d_z": d_z, **sizes, "BC": BC, "SIGMOID": gate == "sigmoid"}

    heads = H if x.dim() == 2 else 1
    token, head = (L, 0) if x.dim() == 2 else (H * L, L)
    _d_tokens[(triton.cdiv(T, dx_cut.rows), H // heads, columns)](
        **arguments, dx=dx, dx_t=token, dx_h=head, heads=heads, **launch(dx_cut)
    )

    blocks = triton.cdiv(E, dw_cut.cols) * columns
    programs, walk = walks(triton.cdiv(T, dw_cut.rows), 4 * H * blocks)
    part = dw_HEL if programs == 1 else dw_HEL.new_empty(programs, H, E, L)
    _d_weights[(programs, H, blocks)](
        **arguments, dw=part, walk=walk, columns=columns, **launch(dw_cut)
    )
    if programs > 1:
        torch.sum(part, 0, out=dw_HEL)
