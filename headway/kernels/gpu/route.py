"""Routing in one pass over the tokens: scores, bias, exact top-k, gates and statistics. A score
lives in registers only; nothing of size T×E is written.

T tokens · H heads · L width · E experts per head · K chosen. One program takes a tile of tokens of
one head and walks all experts chunk by chunk; where they fit one chunk (E ≤ 128) the statistics
over tokens come from the same scores, else from a second pass. Per score and pass it spends 3·L
multiply-adds on the tensor cores (tokens in bfloat16; 6·L in float32), and about 8·K operations on
the selection: K rounds of an arg-max, each one maximum, three operations to find its lowest column,
two to read the score there and two to take it out. A bitonic sort of 64-bit (score, column) keys
takes about ten exchanges of a dozen instructions per score for K = 8; the rounds are cheaper up to
K ≈ 16, and take any K.

Top-k merged across chunks of experts, K = 2, two chunks of four: every round takes the better of
the chunk's best and the best that earlier chunks left; earlier ones win ties, their columns are
lower. What is taken is set to CHOSEN, below every number.

    after chunk 0   key_k = [9, 7]   e_k = [2, 0]
    chunk 1         scores 5 8 9 1 at columns 4 5 6 7
      round 0       earlier best 9 (column 2) >= chunk's 9 (column 6): take column 2
      round 1       earlier best 7 (column 0) <  chunk's 9 (column 6): take column 6
    after chunk 1   key_k = [9, 9]   e_k = [2, 6]"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu.arith import sigmoid
from headway.kernels.gpu.ops import GATES
from headway.kernels.gpu.scores import (
    fitting,
    launch,
    normalised,
    scores,
    split_w,
    strides,
    walks,
    width,
)

CHOSEN = tl.constexpr(-(2**31))
"""Below the key of every number."""
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _order(s):
    """Return int32 keys in the order of the numbers: −0 = 0, every NaN the largest."""
    bits = tl.where(s == 0, 0.0, s).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(s != s, 0x7FFFFFFF, key)


@triton.jit
def _top(key, column):
    """Return (largest key, its lowest column) of each row."""
    top = tl.max(key, 1)
    return top, tl.min(tl.where(key == top[:, None], column, NOWHERE), 1)


@triton.jit
def _pick(s, here):
    """Return the one number of each row where `here` holds, whatever the others are."""
    return tl.sum(tl.where(here, s, 0.0), 1)


@triton.jit
def _logsumexp(most, mass):
    return tl.where(tl.abs(most) == float("inf"), 0.0, most) + tl.log(mass)


@triton.jit
def _gates(s, slot, lse, scale, K: tl.constexpr, GATE: tl.constexpr, RENORMALIZE: tl.constexpr):
    """Return the gates of the chosen logits `[BT, BK]`; 0 beyond K."""
    valid = (slot < K)[None, :]
    if GATE == 0:
        s = tl.where(valid, s, -float("inf"))
        g = tl.exp(s - tl.max(s, 1)[:, None])
        g = g / tl.sum(tl.where(valid, g, 0.0), 1)[:, None]
    elif GATE == 1:
        g = normalised(s, lse, lse, False)
    else:
        g = sigmoid(s)
    g = tl.where(valid, g, 0.0)
    if RENORMALIZE:
        total = tl.sum(g, 1)
        g = g / tl.where(total < 1e-20, 1e-20, total)[:, None]  # keeps NaN
    return g * scale


@triton.jit
def _over_tokens(s, lse, total, t, T, e, E, SIGMOID: tl.constexpr):
    """Return what a tile adds to the sums over tokens: normalised scores `[BE]`, entropies."""
    inside = (t < T)[:, None] & (e < E)[None, :]
    p = tl.where(inside, normalised(s, lse, total, SIGMOID), 0.0)
    return tl.sum(p, 0), -tl.sum(tl.where(p == 0, 0.0, p * tl.log(p)))


@triton.jit
def _choices(index, row, t, T, e, K: tl.constexpr):
    """Count each expert in a tile of the index; float32, exact."""
    n = tl.full((e.shape[0],), 0, tl.int32)
    for j in range(K):
        at = tl.load(index + row * K + j, mask=t < T, other=-1).to(tl.int32)
        n += tl.sum((at[:, None] == e[None, :]).to(tl.int32), 0)
    return n.to(tl.float32)


@triton.jit
def _store_columns(sums, program, h, H, e, E, p, n, entropy, chunk, chunks):
    """Store a program's sums in `sums [programs, H, 2·E + chunks]`."""
    at = sums + (program * H + h).to(tl.int64) * (2 * E + chunks)
    tl.store(at + e, p, mask=e < E)
    tl.store(at + E + e, n, mask=e < E)
    tl.store(at + 2 * E + chunk, entropy)


@triton.jit
def _choose(
    x, parts, bias, replay, gate, index, saved, rows, sums, sums_z,
    T, H, E, L, stride_t, stride_h, stride_l, scale,
    K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    GATE: tl.constexpr, RENORMALIZE: tl.constexpr, ONCE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Select experts and compute gates for a tile of tokens (picture at the head). WHOLE: all
    experts are one chunk, so the statistics over tokens come from the same scores."""
    tile, h = tl.program_id(0), tl.program_id(1)
    SIGMOID: tl.constexpr = GATE == 2
    x += h.to(tl.int64) * stride_h
    slot, column = tl.arange(0, BK), tl.arange(0, BE)
    t = tile * BT + tl.arange(0, BT)
    row = t.to(tl.int64) * H + h
    slots = row[:, None] * K + slot[None, :]
    taken = (t < T)[:, None] & (slot < K)[None, :]
    most, mass, total = (
        tl.full((BT,), -float("inf"), tl.float32),
        tl.full((BT,), 0.0, tl.float32),
        tl.full((BT,), 0.0, tl.float32),
    )
    key_k = tl.full((BT, BK), CHOSEN, tl.int32)
    s_k = tl.full((BT, BK), float("nan"), tl.float32)
    if replay is None:
        e_k = tl.full((BT, BK), NOWHERE, tl.int32)
    else:
        e_k = tl.load(replay + slots, mask=taken, other=-1).to(tl.int32)
    for e0 in range(0, 1 if WHOLE else E, BE):
        e = e0 + column
        s = scores(x, parts, t, T, h, e, H, E, L, stride_t, stride_l, BL, ONCE)
        s = tl.where((e < E)[None, :], s, -float("inf"))
        # logsumexp as it goes; a row's infinite maximum is not subtracted
        greater = tl.maximum(most, tl.max(s, 1))
        shift = tl.where(tl.abs(greater) == float("inf"), 0.0, greater)
        mass = mass * tl.exp(most - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        most = greater
        score = s
        if SIGMOID:
            score = tl.where((e < E)[None, :], sigmoid(s), 0.0)
            total += tl.sum(score, 1)
        if replay is None:
            score += tl.load(bias + h * E + e, mask=e < E, other=0.0)[None, :]
            key = tl.where((e < E)[None, :], _order(score), CHOSEN)
            key_n, e_n, s_n = key_k, e_k, s_k
            for j in range(K):
                top, at = _top(key, e[None, :])
                here = e[None, :] == at[:, None]
                logit = _pick(s, here)
                if WHOLE:
                    key = tl.where(here, CHOSEN, key)
                else:  # the best left of those from earlier chunks, whose columns are lower
                    top_k, at_k = _top(key_k, e_k)
                    here_k = e_k == at_k[:, None]
                    earlier = top_k >= top
                    logit = tl.where(earlier, _pick(s_k, here_k), logit)
                    at = tl.where(earlier, at_k, at)
                    top = tl.where(earlier, top_k, top)
                    key = tl.where(here & ~earlier[:, None], CHOSEN, key)
                    here_k &= earlier[:, None]
                    key_k = tl.where(here_k, CHOSEN, key_k)
                    e_k = tl.where(here_k, NOWHERE, e_k)  # no column stands there twice
                key_n = tl.where((slot == j)[None, :], top[:, None], key_n)
                e_n = tl.where((slot == j)[None, :], at[:, None], e_n)
                s_n = tl.where((slot == j)[None, :], logit[:, None], s_n)
            key_k, e_k, s_k = key_n, e_n, s_n
        else:
            for j in tl.static_range(K):
                at = tl.load(replay + row * K + j, mask=t < T, other=-1).to(tl.int32)
                logit = _pick(s, e[None, :] == at[:, None])
                in_chunk = (at >= e0) & (at < tl.minimum(e0 + BE, E))
                here_k = in_chunk[:, None] & (slot == j)[None, :]
                s_k = tl.where(here_k, logit[:, None], s_k)
        if WHOLE:
            lse = _logsumexp(most, mass)
            p, entropy = _over_tokens(s, lse, total, t, T, e, E, SIGMOID)
            if replay is None:
                chosen = (t < T)[:, None] & (e < E)[None, :] & (key == CHOSEN)
                n = tl.sum(chosen.to(tl.float32), 0)
            else:
                n = _choices(replay, row, t, T, e, K)
            _store_columns(sums, tile, h, H, e, E, p, n, entropy, 0, 1)
    lse = _logsumexp(most, mass)
    g_k = _gates(s_k, slot, lse, scale, K, GATE, RENORMALIZE)
    tl.store(index + slots, e_k, mask=taken)
    tl.store(gate + slots, g_k, mask=taken)
    if GATE != 0:
        tl.store(saved + slots, s_k, mask=taken)
    tl.store(rows + row, lse, mask=t < T)
    if SIGMOID:
        tl.store(rows + T * H + row, total, mask=t < T)
    tl.store(sums_z + tile * H + h, tl.sum(tl.where(t < T, lse * lse, 0.0)))


@triton.jit
def _columns(
    x, parts, index, rows, sums, T, H, E, L, stride_t, stride_h, stride_l, walk, chunks,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    SIGMOID: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Compute the statistics over tokens of one chunk of experts where there are several: their
    scores a second time, now that each row's sum is known."""
    program, h, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x += h.to(tl.int64) * stride_h
    e = chunk * BE + tl.arange(0, BE)
    p_sum, n_sum, entropy_sum = (
        tl.full((BE,), 0.0, tl.float32),
        tl.full((BE,), 0.0, tl.float32),
        0.0,
    )
    for tile in range(program * walk, tl.minimum((program + 1) * walk, (T + BT - 1) // BT)):
        t = tile * BT + tl.arange(0, BT)
        row = t.to(tl.int64) * H + h
        s = scores(x, parts, t, T, h, e, H, E, L, stride_t, stride_l, BL, ONCE)
        lse = tl.load(rows + row, mask=t < T, other=0.0)
        total = lse
        if SIGMOID:
            total = tl.load(rows + T * H + row, mask=t < T, other=1.0)
        p, entropy = _over_tokens(s, lse, total, t, T, e, E, SIGMOID)
        p_sum += p
        n_sum += _choices(index, row, t, T, e, K)
        entropy_sum += entropy
    _store_columns(sums, program, h, H, e, E, p_sum, n_sum, entropy_sum, chunk, chunks)


@triton.jit
def _finish(
    sums, sums_z, prob, z, entropy, counts, programs, tiles, H, E, chunks, per_token, per_log,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum over programs, in their order."""
    h, e = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width, i = 2 * E + chunks, tl.arange(0, 64)
    p_sum, n_sum = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for i0 in range(0, programs, 64):
        at = sums + ((i0 + i) * H + h).to(tl.int64)[:, None] * width + e[None, :]
        inside = (i0 + i < programs)[:, None] & (e < E)[None, :]
        p_sum += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        n_sum += tl.sum(tl.load(at + E, mask=inside, other=0.0), 0)
    tl.store(prob + h * E + e, p_sum * per_token, mask=e < E)
    tl.store(counts + h * E + e, n_sum, mask=e < E)
    if tl.program_id(1) == 0:
        z_sum, entropy_sum = 0.0, 0.0
        for i0 in range(0, tiles, 64):
            z_sum += tl.sum(tl.load(sums_z + (i0 + i) * H + h, mask=i0 + i < tiles, other=0.0))
        for i0 in range(0, programs * chunks, 64):
            at = sums + ((i0 + i) // chunks * H + h).to(tl.int64) * width + 2 * E
            at += (i0 + i) % chunks
            entropy_sum += tl.sum(tl.load(at, mask=i0 + i < programs * chunks, other=0.0))
        tl.store(z + h, z_sum * per_token)
        tl.store(entropy + h, entropy_sum * per_log)


def forward(
    x: Tensor,
    w_HEL: Tensor,
    bias_HE: Tensor,
    index_THK: Tensor | None,
    out: tuple[Tensor, ...],
    gate: str,
    renormalize: bool,
    scale: float,
) -> None:
    """Fill what `gpu.ops.route_tokens` returns."""
    gate_THK, prob_HE, z_H, entropy_H, counts_HE, chosen_THK, saved_THK, rows_CTH = out
    (H, E, L), (T, _, K) = w_HEL.shape, gate_THK.shape
    if T == 0:
        for statistic in (prob_HE, z_H, entropy_H, counts_HE):
            statistic.zero_()
        return
    cut, column_cut = (fitting(name, x, w_HEL) for name in ("route", "route_columns"))
    BL, whole, n_tiles = width(L, 64), cut.cols >= E, triton.cdiv(T, cut.rows)
    if whole:
        programs, chunks, walk = n_tiles, 1, 1
    else:
        chunks = triton.cdiv(E, column_cut.cols)
        programs, walk = walks(triton.cdiv(T, column_cut.rows), H * chunks)
    sizes = {"T": T, "H": H, "E": E, "L": L, **strides(x), "BL": BL, "ONCE": L <= BL}
    sums = x.new_empty(programs, H, 2 * E + chunks, dtype=torch.float32)
    sums_z = x.new_empty(n_tiles, H, dtype=torch.float32)
    parts = split_w(w_HEL)
    _choose[(n_tiles, H)](
        x=x, parts=parts, bias=bias_HE.contiguous(),
        replay=None if index_THK is None else index_THK.contiguous(),
        gate=gate_THK, index=chosen_THK, saved=saved_THK, rows=rows_CTH, sums=sums, sums_z=sums_z,
        **sizes, scale=scale, K=K, BK=triton.next_power_of_2(K), GATE=GATES.index(gate),
        RENORMALIZE=renormalize, WHOLE=whole, **launch(cut),
    )  # fmt: skip
    if not whole:
        _columns[(programs, H, chunks)](
            x=x, parts=parts, index=chosen_THK, rows=rows_CTH, sums=sums, **sizes,
            walk=walk, chunks=chunks, K=K, SIGMOID=gate == "sigmoid", **launch(column_cut),
        )  # fmt: skip
    _finish[(H, triton.cdiv(E, 128))](
        sums=sums, sums_z=sums_z, prob=prob_HE, z=z_H, entropy=entropy_H, counts=counts_HE,
        programs=programs, tiles=n_tiles, H=H, E=E, chunks=chunks,
        per_token=1 / T, per_log=1 / (T * math.log(max(E, 2))), BLOCK=128,
    )  # fmt: skip
