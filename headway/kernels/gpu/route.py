"""Routing in one pass over the tokens: scores, bias, exact top-k, gates and statistics. A score
lives in registers only; nothing of size T×E is written.

T tokens · H heads · L width · E experts per head · K chosen. One program walks several tiles of
tokens of one head and, for each, all experts chunk by chunk. Per score it spends 3·L multiply-adds
on the tensor cores (tokens in bfloat16; 6·L in float32) and about 8·K operations on the selection:
K rounds of an arg-max, each one maximum, three operations to find its lowest column, two to read
the score there and two to take it out. A bitonic sort of 64-bit (score, column) keys takes about
ten exchanges of a dozen instructions per score for K = 8, whatever K rounds to; the rounds are
cheaper up to K ≈ 16, and take any K.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu import on
from headway.kernels.gpu.product import dot_exact, dot_split, split_into
from headway.kernels.gpu.tune import Tiles, tiles

GATES = ("topk_softmax", "softmax_topk", "sigmoid")
PROGRAMS = 1024
"""About as many programs walk the tiles of all heads: several waves on any GPU, and so few that
their partial sums stay small."""

TAKEN = tl.constexpr(-(2**31))
"""Below the key of every number."""
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def load_x(x, t, T, l0, L, stride_t, stride_l, BL: tl.constexpr):
    """A tile of tokens, columns l0 … l0 + BL − 1; 0 beyond the ends."""
    column = l0 + tl.arange(0, BL)
    at = t.to(tl.int64)[:, None] * stride_t + column[None, :] * stride_l
    return tl.load(x + at, mask=(t < T)[:, None] & (column < L)[None, :], other=0.0)


@triton.jit
def load_w(parts, part: tl.constexpr, h, e, H, E, l0, L, BL: tl.constexpr):
    """One of the three parts of some experts' rows `[BE, BL]`."""
    column = l0 + tl.arange(0, BL)
    at = ((part * H + h).to(tl.int64) * E + e)[:, None] * L + column[None, :]
    return tl.load(parts + at, mask=(e < E)[:, None] & (column < L)[None, :], other=0.0)


@triton.jit
def scores(
    x, parts, t, T, h, e, H, E, L, stride_t, stride_l,
    BL: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Logits `[BT, BE]`; 0 beyond the ends. ONCE: L fits one block."""
    acc = tl.full((t.shape[0], e.shape[0]), 0.0, tl.float32)
    for l0 in range(0, 1 if ONCE else L, BL):
        xt = load_x(x, t, T, l0, L, stride_t, stride_l, BL)
        w0 = tl.trans(load_w(parts, 0, h, e, H, E, l0, L, BL))
        w1 = tl.trans(load_w(parts, 1, h, e, H, E, l0, L, BL))
        w2 = tl.trans(load_w(parts, 2, h, e, H, E, l0, L, BL))
        if xt.dtype == tl.bfloat16:
            acc = dot_exact(xt, w0, w1, w2, acc)
        else:
            acc = dot_split(xt, w0, w1, w2, acc)
    return acc


@triton.jit
def sigmoid(s):
    return 1.0 / (1.0 + tl.exp(-s))


@triton.jit
def normalised(s, lse, total, SIGMOID: tl.constexpr):
    """The scores of a row normalised to sum 1, given its logsumexp and its sum of σ."""
    if SIGMOID:
        return sigmoid(s) / tl.where(total < 1e-20, 1e-20, total)[:, None]  # keeps NaN
    else:
        lse = tl.where(tl.abs(lse) == float("inf"), float("nan"), lse)  # as a softmax
        return tl.exp(s - lse[:, None])


@triton.jit
def _order(s):
    """int32 keys in the order of the numbers: −0 = 0, every NaN the largest."""
    bits = tl.where(s == 0, 0.0, s).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(s != s, 0x7FFFFFFF, key)


@triton.jit
def _top(key, column):
    """(largest key, its lowest column) of each row."""
    top = tl.max(key, 1)
    return top, tl.min(tl.where(key == top[:, None], column, NOWHERE), 1)


@triton.jit
def _pick(s, here):
    """The one number of each row where `here` holds, whatever the others are."""
    return tl.sum(tl.where(here, s, 0.0), 1)


@triton.jit
def _logsumexp(most, mass):
    return tl.where(tl.abs(most) == float("inf"), 0.0, most) + tl.log(mass)


@triton.jit
def _gates(s, slot, lse, scale, K: tl.constexpr, GATE: tl.constexpr, RENORMALIZE: tl.constexpr):
    """Gates of the chosen logits `[BT, BK]`; 0 beyond K."""
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
    """What a tile adds to the sums over tokens: normalised scores `[BE]`, entropies."""
    inside = (t < T)[:, None] & (e < E)[None, :]
    p = tl.where(inside, normalised(s, lse, total, SIGMOID), 0.0)
    return tl.sum(p, 0), -tl.sum(tl.where(p == 0, 0.0, p * tl.log(p)))


@triton.jit
def _choices(index, row, t, T, e, K: tl.constexpr):
    """How often each expert occurs in a tile of the index; float32, exact."""
    n = tl.full((e.shape[0],), 0, tl.int32)
    for j in tl.static_range(K):
        at = tl.load(index + row * K + j, mask=t < T, other=-1).to(tl.int32)
        n += tl.sum((at[:, None] == e[None, :]).to(tl.int32), 0)
    return n.to(tl.float32)


@triton.jit
def _store_columns(sums, program, h, H, e, E, p, n, entropy, chunk, chunks):
    """`sums [programs, H, 2·E + chunks]`."""
    at = sums + (program * H + h).to(tl.int64) * (2 * E + chunks)
    tl.store(at + e, p, mask=e < E)
    tl.store(at + E + e, n, mask=e < E)
    tl.store(at + 2 * E + chunk, entropy)


@triton.jit
def _choose(
    x, parts, bias, replay, gate, index, kept, rows, sums, sums_z,
    T, H, E, L, stride_t, stride_h, stride_l, walk, scale,
    K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    GATE: tl.constexpr, RENORMALIZE: tl.constexpr, ONCE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Selection and gates of some tiles of tokens. WHOLE: all experts are one chunk, so the
    statistics over tokens come from the same scores."""
    program, h = tl.program_id(0), tl.program_id(1)
    SIGMOID: tl.constexpr = GATE == 2
    x += h.to(tl.int64) * stride_h
    slot, column = tl.arange(0, BK), tl.arange(0, BE)
    p_sum, n_sum = tl.full((BE,), 0.0, tl.float32), tl.full((BE,), 0.0, tl.float32)
    entropy_sum, z_sum = 0.0, 0.0
    for tile in range(program * walk, tl.minimum((program + 1) * walk, (T + BT - 1) // BT)):
        t = tile * BT + tl.arange(0, BT)
        row = t.to(tl.int64) * H + h
        slots = row[:, None] * K + slot[None, :]
        taken = (t < T)[:, None] & (slot < K)[None, :]
        most, mass, total = (
            tl.full((BT,), -float("inf"), tl.float32),
            tl.full((BT,), 0.0, tl.float32),
            tl.full((BT,), 0.0, tl.float32),
        )
        key_k = tl.full((BT, BK), TAKEN, tl.int32)
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
                key = tl.where((e < E)[None, :], _order(score), TAKEN)
                key_n, e_n, s_n = key_k, e_k, s_k
                for j in range(K):
                    top, at = _top(key, e[None, :])
                    here = e[None, :] == at[:, None]
                    found = _pick(s, here)
                    if WHOLE:
                        key = tl.where(here, TAKEN, key)
                    else:  # the best left of those from earlier chunks, whose columns are lower
                        top_k, at_k = _top(key_k, e_k)
                        here_k = e_k == at_k[:, None]
                        stays = top_k >= top
                        found = tl.where(stays, _pick(s_k, here_k), found)
                        at = tl.where(stays, at_k, at)
                        top = tl.where(stays, top_k, top)
                        key = tl.where(here & ~stays[:, None], TAKEN, key)
                        key_k = tl.where(here_k & stays[:, None], TAKEN, key_k)
                    key_n = tl.where((slot == j)[None, :], top[:, None], key_n)
                    e_n = tl.where((slot == j)[None, :], at[:, None], e_n)
                    s_n = tl.where((slot == j)[None, :], found[:, None], s_n)
                key_k, e_k, s_k = key_n, e_n, s_n
            else:
                for j in tl.static_range(K):
                    at = tl.load(replay + row * K + j, mask=t < T, other=-1).to(tl.int32)
                    found = _pick(s, e[None, :] == at[:, None])
                    in_chunk = (at >= e0) & (at < tl.minimum(e0 + BE, E))
                    here_k = in_chunk[:, None] & (slot == j)[None, :]
                    s_k = tl.where(here_k, found[:, None], s_k)
            if WHOLE:
                lse = _logsumexp(most, mass)
                p, entropy = _over_tokens(s, lse, total, t, T, e, E, SIGMOID)
                p_sum += p
                entropy_sum += entropy
                if replay is None:
                    chosen = (t < T)[:, None] & (e < E)[None, :] & (key == TAKEN)
                    n_sum += tl.sum(chosen.to(tl.float32), 0)
                else:
                    n_sum += _choices(replay, row, t, T, e, K)
        lse = _logsumexp(most, mass)
        g_k = _gates(s_k, slot, lse, scale, K, GATE, RENORMALIZE)
        tl.store(index + slots, e_k, mask=taken)
        tl.store(gate + slots, g_k, mask=taken)
        if GATE != 0:
            tl.store(kept + slots, s_k, mask=taken)
        tl.store(rows + row, lse, mask=t < T)
        if SIGMOID:
            tl.store(rows + T * H + row, total, mask=t < T)
        z_sum += tl.sum(tl.where(t < T, lse * lse, 0.0))
    tl.store(sums_z + program * H + h, z_sum)
    if WHOLE:
        _store_columns(sums, program, h, H, column, E, p_sum, n_sum, entropy_sum, 0, 1)


@triton.jit
def _columns(
    x, parts, index, rows, sums, T, H, E, L, stride_t, stride_h, stride_l, walk, chunks,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
    SIGMOID: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """The statistics over tokens of one chunk of experts, where there are several: their scores a
    second time, now that each row's sum is known."""
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
    sums, sums_z, prob, z, entropy, counts, programs, programs_z, H, E, chunks, per_token, per_log,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over programs, in their order."""
    h, e = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = 2 * E + chunks
    p_sum, n_sum = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for i in range(programs):
        at = sums + (i * H + h).to(tl.int64) * width
        p_sum += tl.load(at + e, mask=e < E, other=0.0)
        n_sum += tl.load(at + E + e, mask=e < E, other=0.0)
    tl.store(prob + h * E + e, p_sum * per_token, mask=e < E)
    tl.store(counts + h * E + e, n_sum, mask=e < E)
    if tl.program_id(1) == 0:
        z_sum, entropy_sum = 0.0, 0.0
        for i in range(programs_z):
            z_sum += tl.load(sums_z + i * H + h)
        for i in range(programs * chunks):
            at = sums + (i // chunks * H + h).to(tl.int64) * width
            entropy_sum += tl.load(at + 2 * E + i % chunks)
        tl.store(z + h, z_sum * per_token)
        tl.store(entropy + h, entropy_sum * per_log)


def split_w(w_HEL: Tensor) -> Tensor:
    """The three bfloat16 parts `[3, H, E, L]` of the weights."""
    parts = w_HEL.new_empty(3, *w_HEL.shape, dtype=torch.bfloat16)
    n = w_HEL.numel()
    split_into[(triton.cdiv(n, 1024),)](w_HEL.contiguous(), parts, n, BLOCK=1024)
    return parts


def strides(x: Tensor) -> tuple[int, int, int]:
    """From a token, a head and a column to the next; `[T, L]` is one token for all heads."""
    return (x.stride(0), 0, x.stride(1)) if x.dim() == 2 else x.stride()


def width(L: int, most: int) -> int:
    """Columns of a tile of tokens: a power of two."""
    return min(max(triton.next_power_of_2(L), 16), most)


def walks(n_tiles: int, per_tile: int) -> tuple[int, int]:
    """(programs, tiles that each walks) for `n_tiles` tiles, each worked on by `per_tile`
    programs."""
    walk = triton.cdiv(n_tiles * per_tile, PROGRAMS)
    return triton.cdiv(n_tiles, walk), walk


def fitting(kernel: str, L: int, E: int, default: Tiles) -> Tiles:
    """The tiles of a kernel; no more columns than there are experts."""
    found = tiles(kernel, (L, E), default)
    return Tiles(
        found.rows, min(found.cols, triton.next_power_of_2(max(E, 16))), found.warps, found.stages
    )


def choose_tiles(L: int, E: int) -> Tiles:
    return fitting("route", L, E, Tiles(64, 64, 4, 2))


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
    """Fills what `gpu.ops.route_tokens` returns."""
    gate_THK, prob_HE, z_H, entropy_H, counts_HE, chosen_THK, kept_THK, rows_CTH = out
    (H, E, L), (T, _, K) = w_HEL.shape, gate_THK.shape
    if T == 0:
        for statistic in (prob_HE, z_H, entropy_H, counts_HE):
            statistic.zero_()
        return
    cut, BL = choose_tiles(L, E), width(L, 64)
    sizes = (T, H, E, L, *strides(x))
    n_tiles, chunks = triton.cdiv(T, cut.rows), triton.cdiv(E, cut.cols)
    programs_z, walk = walks(n_tiles, H)
    shape = {"BT": cut.rows, "BE": cut.cols, "BL": BL, "ONCE": L <= BL}
    launch = {"num_warps": cut.warps, "num_stages": cut.stages}
    programs, walk_columns = walks(n_tiles, H * chunks)
    sums = x.new_empty(programs, H, 2 * E + chunks, dtype=torch.float32)
    sums_z = x.new_empty(programs_z, H, dtype=torch.float32)
    with on(x):
        parts = split_w(w_HEL)
        _choose[(programs_z, H)](
            x, parts, bias_HE.contiguous(), None if index_THK is None else index_THK.contiguous(),
            gate_THK, chosen_THK, kept_THK, rows_CTH, sums, sums_z, *sizes, walk, scale,
            K=K, BK=triton.next_power_of_2(K), GATE=GATES.index(gate), RENORMALIZE=renormalize,
            WHOLE=chunks == 1, **shape, **launch,
        )  # fmt: skip
        if chunks > 1:
            _columns[(programs, H, chunks)](
                x, parts, chosen_THK, rows_CTH, sums, *sizes, walk_columns, chunks,
                K=K, SIGMOID=gate == "sigmoid", **shape, **launch,
            )  # fmt: skip
        _finish[(H, triton.cdiv(E, 128))](
            sums, sums_z, prob_HE, z_H, entropy_H, counts_HE, programs, programs_z, H, E, chunks,
            1 / T, 1 / (T * math.log(max(E, 2))), BLOCK=128,
        )  # fmt: skip
