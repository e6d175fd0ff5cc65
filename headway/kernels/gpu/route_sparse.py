"""Backward of routing where only the chosen logits have a gradient: by slots, not by experts.

    dx_t = Σ_h Σ_j ds[t, h, j]·w[h, index[t, h, j]];   dw[h, e] = Σ_slots ds[slot]·x[token, h]

No balance loss, no z-loss, no `softmax_topk`. The first sum gathers K rows of weights per
sub-token. For the second one slots are sorted by (head, expert) and each expert's rows, which then
lie together, are summed in blocks whose number is known before the data (blocks.py); an expert that
took every slot is summed by `SPLITS` programs at most. Their sums are added in the blocks' order.
float32 throughout, no atomics, no host sync, the same bits on every run."""

import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu.arith import narrow, widen
from headway.kernels.gpu.blocks import blocks
from headway.kernels.gpu.permute import STEP, sort_rows
from headway.kernels.gpu.scores import load_x, strides, width
from headway.kernels.gpu.tune import Tiles

ROWS = 32
"""Tokens, slots or partial sums that a program works on at once."""

SPLITS = 256
"""Partial sums of one expert, at most."""

LEAST = 64
"""Slots of a block, at least: partial sums are then small beside the rows they sum."""


def reads_less(E: int, L: int, K: int, itemsize: int, dx: Tiles, dw: Tiles) -> bool:
    """Return whether going by slots reads less than going by experts, in bytes per sub-token.

    By experts (route_backward.py): for dx the two bfloat16 parts of all weights (three in float32)
    once per tile of tokens, for dw the token once per chunk of experts, and for both the K slots,
    8 bytes each, once per chunk. By slots: one float32 row of weights, one token and 24 bytes of
    numbers each, and the sort, whose 2·STEP comparisons count a byte each. Most of either comes
    from the cache. In bfloat16 at L = 128 and the default tiles the two are equal near E = 60·K for
    small K and 50·K for K = 8."""
    parts = 2 if itemsize == 2 else 3
    by_experts = E * (2 * parts * L / dx.rows + itemsize * L / dw.cols)
    by_experts += E * 8 * K * (1 / dx.cols + 1 / dw.cols)
    return K * ((4 + itemsize) * L + 24 + 2 * STEP) < by_experts


@triton.jit
def _sparse_tokens(
    w, index, ds, dx, T, H, E, L, dx_t, dx_h, heads,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a tile of tokens, some of its columns: over one head's slots, or over
    those of all heads that read the same token."""
    t, column = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(2) * BC + tl.arange(0, BC)
    acc = tl.full((BT, BC), 0.0, tl.float32)
    h0 = tl.program_id(1) * heads
    for i in range(heads):
        h = h0 + i
        for j in range(K):
            slot = (t.to(tl.int64) * H + h) * K + j
            e = tl.load(index + slot, mask=t < T, other=-1)
            live = (e >= 0) & (e < E)
            value = tl.load(ds + slot, mask=live, other=0.0)
            at = w + (h * E + e).to(tl.int64)[:, None] * L + column[None, :]
            row = tl.load(at, mask=live[:, None] & (column < L)[None, :], other=0.0)
            acc += value[:, None] * row
    at = dx + t.to(tl.int64)[:, None] * dx_t + tl.program_id(1) * dx_h + column[None, :]
    inside = (t < T)[:, None] & (column < L)[None, :]
    tl.store(at, narrow(acc, dx.dtype.element_ty), mask=inside)


@triton.jit
def _sparse_weights(
    x, ds, slots, start, group, first_row, part,
    T, H, E, L, K, stride_t, stride_h, stride_l, block, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum one block of an expert's sorted rows, some of its columns. `part`: block i of expert g is
    at start[g] // block + g + i, where no other block can be."""
    g, l0 = tl.load(group + tl.program_id(0)), tl.program_id(1) * BC
    if g < 0:
        return
    x += (g // E).to(tl.int64) * stride_h
    first, begin = tl.load(start + g), tl.load(first_row + tl.program_id(0))
    end = tl.minimum(begin + block, tl.load(start + g + 1))
    acc = tl.full((BR, BC), 0.0, tl.float32)
    for r0 in range(begin, end, BR):
        row = r0 + tl.arange(0, BR)
        slot = tl.load(slots + row, mask=row < end, other=0)
        value = tl.load(ds + slot, mask=row < end, other=0.0)
        t = tl.where(row < end, slot // (H * K), T)
        acc += value[:, None] * widen(load_x(x, t, T, l0, L, stride_t, stride_l, BC))
    column = l0 + tl.arange(0, BC)
    to = part + (first // block + g + (begin - first) // block).to(tl.int64) * L + column
    tl.store(to, tl.sum(acc, 0), mask=column < L)


@triton.jit
def _sparse_sums(part, start, dw, L, block, BR: tl.constexpr, BC: tl.constexpr):
    """Sum an expert's blocks, some of its columns; zeros where it has none."""
    g, column = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.load(start + g)
    n = (tl.load(start + g + 1) - first + block - 1) // block
    part += (first // block + g).to(tl.int64) * L
    acc = tl.full((BR, BC), 0.0, tl.float32)
    for i0 in range(0, n, BR):
        i = i0 + tl.arange(0, BR)
        inside = (i < n)[:, None] & (column < L)[None, :]
        acc += tl.load(part + i[:, None] * L + column[None, :], mask=inside, other=0.0)
    tl.store(dw + g.to(tl.int64) * L + column, tl.sum(acc, 0), mask=column < L)


def block_rows(n_slots: int) -> int:
    """Return the slots of a block, of `n_slots` per head: a power of two, so few kernels differ."""
    return max(LEAST, triton.next_power_of_2(triton.cdiv(n_slots, SPLITS)))


def backward(
    x: Tensor, w_HEL: Tensor, index_THK: Tensor, ds_THK: Tensor, dx: Tensor, dw_HEL: Tensor
) -> None:
    """Fill the gradients of the tokens and of the weights, given that of the chosen logits; a slot
    whose index is no expert adds nothing."""
    (H, E, L), (T, _, K) = w_HEL.shape, index_THK.shape
    BC = width(L, 128)
    columns = triton.cdiv(L, BC)
    heads, token, head = (H, L, 0) if x.dim() == 2 else (1, H * L, L)
    _sparse_tokens[(triton.cdiv(T, ROWS), H // heads, columns)](
        w=w_HEL.contiguous(), index=index_THK, ds=ds_THK, dx=dx, T=T, H=H, E=E, L=L,
        dx_t=token, dx_h=head, heads=heads, K=K, BT=ROWS, BC=BC, num_warps=4,
    )  # fmt: skip

    slot_R, _, counts_HE = sort_rows(index_THK, E)
    block = block_rows(T * K)
    table = blocks(counts_HE, slot_R.numel(), block)
    part = dw_HEL.new_empty(slot_R.numel() // block + H * E, L)
    _sparse_weights[(table.group_B.numel(), columns)](
        x=x, ds=ds_THK, slots=slot_R, **table.arguments(), part=part, T=T, H=H, E=E, L=L, K=K,
        **strides(x), block=block, BR=ROWS, BC=BC, num_warps=4,
    )  # fmt: skip
    _sparse_sums[(H * E, columns)](
        part=part, start=table.start_G, dw=dw_HEL, L=L, block=block, BR=ROWS, BC=BC, num_warps=4
    )
