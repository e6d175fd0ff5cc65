"""The row sort: a stable counting sort of integers without atomics, syncs or padding.

A tile is a run of tokens of one head, whose slots one program walks, `STEP` at a time. Pass 1
counts each expert in each tile; the exclusive sum over (head, expert, tile) says where the first
such slot of the tile goes; pass 2 is the same walk from there and places them. A slot's rank within
a step is the number of equal experts before it, by comparing all pairs: STEP comparisons a slot and
pass, all in registers. The steps of a tile wait for one another, so tiles are short: a tile of one
head meets E experts and not H·E, which keeps the table of places small all the same."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu import on

STEP = 128
"""Slots that are compared with each other at once."""


@triton.jit
def _walk(
    index, place, slot_R, row_NK, TK, H, E, K, steps, tiles, STEP: tl.constexpr, PLACE: tl.constexpr
):
    """Count (or with PLACE: place) the slots of one tile. `place [H·(E + 1), tiles]` has the
    experts of all heads, then none of each head; this program's column of its head's keys holds the
    next place of each key, and every slot advances it."""
    tile, h = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, STEP)
    before = i[None, :] < i[:, None]
    for step in range(tile * steps, (tile + 1) * steps):
        n = step * STEP + i  # of this head's slots
        live = n < TK
        slot = (n // K * H + h) * K + n % K
        e = tl.load(index + slot, mask=live, other=-1).to(tl.int32)
        key = tl.where((e >= 0) & (e < E), h * E + e, H * E + h)
        key = tl.where(live, key, -1)  # no slot
        same = key[:, None] == key[None, :]
        rank = tl.sum((same & before).to(tl.int32), 1)
        n_same = tl.sum(same.to(tl.int32), 1)
        mine = place + key.to(tl.int64) * tiles + tile
        to = tl.load(mine, mask=live, other=0) + rank
        if PLACE:
            tl.store(slot_R + to, slot, mask=live)
            tl.store(row_NK + slot, to, mask=live)
        tl.debug_barrier()  # all have read before one of each key writes
        tl.store(mine, to + 1, mask=live & (rank == n_same - 1))
        tl.debug_barrier()


def sort_rows(index_THK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `slot_R`, `row_NK` and `counts_HE` of `kernels.permute.Rows`, in int32. An index
    outside 0 … E − 1 takes no expert.

    Tiles are so long, 1024 slots at least, that the table of places is at most half as large as
    `slot_R`."""
    (T, H, K), R, E = index_THK.shape, index_THK.numel(), n_experts
    assert R < 2**31, f"{R} rows are more than an int32 counts"
    make = index_THK.new_empty
    slot_R, row_NK = make(R, dtype=torch.int32), make(T * H, K, dtype=torch.int32)
    if R == 0:
        return slot_R, row_NK, index_THK.new_zeros(H, E, dtype=torch.int32)
    steps = triton.next_power_of_2(triton.cdiv(max(1024, 2 * E), STEP))
    tiles = triton.cdiv(T * K, steps * STEP)
    place = index_THK.new_zeros(H * (E + 1), tiles, dtype=torch.int32)
    arguments = {"index": index_THK.contiguous(), "slot_R": slot_R, "row_NK": row_NK}
    arguments |= {"TK": T * K, "H": H, "E": E, "K": K, "steps": steps, "tiles": tiles}
    with on(index_THK):
        _walk[(tiles, H)](**arguments, place=place, STEP=STEP, PLACE=False, num_warps=4)
        counts = place[: H * E].sum(1, dtype=torch.int32)
        place = place.view(-1).cumsum(0, dtype=torch.int32).view_as(place) - place
        _walk[(tiles, H)](**arguments, place=place, STEP=STEP, PLACE=True, num_warps=4)
    return slot_R, row_NK, counts.view(H, E)
