"""Which rows each program of a grouped kernel works on, without asking the device.

R sorted rows · G groups, (head, expert) pairs, whose rows lie one behind the other. A group of n
rows is cut into ⌈n/block⌉ blocks; there are at most ⌈R/block⌉ + G of them, whatever the sizes, so a
grid of that many programs is known before the data and the ones past the last block leave at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu import on

TABLE, GROUPS = 32, 512
"""Entries that a program writes, and groups that it looks at together."""


class Blocks(NamedTuple):
    """Where the blocks of a grouped kernel begin; int32, on the device of the counts."""

    start_G: Tensor
    """`[G + 1]`: first row of every group; the last entry is the number of rows taken."""
    group_B: Tensor
    """`[⌈R/block⌉ + G]`: block → group, −1 past the last block."""
    row_B: Tensor
    """`[⌈R/block⌉ + G]`: block → its first row."""

    def arguments(self) -> dict[str, Tensor]:
        """Return the tables by the names that every kernel has for them."""
        return {"start": self.start_G, "group": self.group_B, "first_row": self.row_B}


def blocks(counts_HE: Tensor, n_rows: int, block: int) -> Blocks:
    """Return the tables for R = `n_rows` and blocks of `block` rows. Nothing waits for the host, so
    a graph can capture it.

    Args: counts_HE: int32 or int64, rows of each group; their sum is at most R < 2³¹."""
    G, make = counts_HE.numel(), counts_HE.new_empty
    B = -(-n_rows // block) + G
    start_G = make(G + 1, dtype=torch.int32)
    group_B, row_B = make(B, dtype=torch.int32), make(B, dtype=torch.int32)
    with on(counts_HE):
        _blocks[(-(-B // TABLE),)](
            counts=counts_HE.contiguous(), start=start_G, group=group_B, row=row_B, G=G, B=B,
            BLOCK=block, TABLE=TABLE, GROUPS=min(GROUPS, triton.next_power_of_2(G)), num_warps=8,
        )  # fmt: skip
    return Blocks(start_G, group_B, row_B)


@triton.jit
def _blocks(
    counts, start, group, row, G, B, BLOCK: tl.constexpr, TABLE: tl.constexpr, GROUPS: tl.constexpr
):
    """Sum the counts from the start and fill this program's entries: entry b belongs to the group
    after all those whose blocks end at or before b. The first program also writes `start`."""
    first = tl.program_id(0) * TABLE
    b = first + tl.arange(0, TABLE)
    before = tl.zeros([TABLE], tl.int32)  # groups whose blocks end at or before b
    skipped = tl.zeros([TABLE], tl.int32)  # their blocks
    rows = tl.zeros([TABLE], tl.int32)  # their rows
    n_rows = 0
    n_blocks = 0
    for g0 in range(0, G, GROUPS):
        g = g0 + tl.arange(0, GROUPS)
        count = tl.load(counts + g, mask=g < G, other=0).to(tl.int32)
        cut = (count + BLOCK - 1) // BLOCK
        end = n_blocks + tl.cumsum(cut)
        if first == 0:
            tl.store(start + g, n_rows + tl.cumsum(count) - count, mask=g < G)
        passed = ((end[None, :] <= b[:, None]) & (g < G)[None, :]).to(tl.int32)
        before += tl.sum(passed, 1)
        skipped += tl.sum(passed * cut[None, :], 1)
        rows += tl.sum(passed * count[None, :], 1)
        n_rows += tl.sum(count)
        n_blocks += tl.sum(cut)
    if first == 0:
        tl.store(start + G, n_rows)
    tl.store(group + b, tl.where(before < G, before, -1), mask=b < B)
    tl.store(row + b, rows + (b - skipped) * BLOCK, mask=b < B)
