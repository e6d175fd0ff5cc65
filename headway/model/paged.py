"""A cache in pages: the tokens of many sequences, of different lengths, in one pass.

A pass holds the T new tokens of all its sequences one after another, as one sequence `[1, T]`:

    tokens     a5 a6 a7 | b40 | c0 c1 …        index    5 6 7 40 0 1 …
    segments   a: 0–2     b: 3  c: 4–5 …

Layers that see equally far share a table of pages; others may have given theirs back.

T tokens · M key/value heads · d head width."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.kernels.norm import HeadRotation
from headway.kernels.paged_attention import PAGE, Pages, Pass, paged_attention
from headway.kernels.rope import rope_rows
from headway.model.context import Positions


class Segment(NamedTuple):
    """The new tokens of one sequence in a pass."""

    start: int
    """Position of the first of them."""
    n_new: int
    pages: Mapping[int, Sequence[int]]
    """By the window of the layers (0: they see all): the pages of the sequence, with room for the
    new tokens."""


def slots_of(segments: Sequence[Segment]) -> list[int]:
    """Return where layers that see all write each new token of a pass, 16·page + offset."""
    return [
        PAGE * s.pages[0][i // PAGE] + i % PAGE
        for s in segments
        for i in range(s.start, s.start + s.n_new)
    ]


class PagedPositions(Positions):
    """Positions of the tokens of a pass, and the pages of their sequences.

    `n_pages`: room in the table for the pages of a sequence; 0: what these have."""

    make_tables = staticmethod(rope_rows)

    def __init__(self, segments: Sequence[Segment], device: torch.device, n_pages: int = 0):
        self.device, self.ragged = device, False
        index = [i for s in segments for i in range(s.start, s.start + s.n_new)]
        firsts = [0, *accumulate(s.n_new for s in segments)]
        rows = [(first, s.n_new, s.start) for first, s in zip(firsts, segments, strict=False)]
        self.index = torch.tensor(index, device=device)
        rows_R3 = torch.tensor(rows, device=device)
        self.where = {
            window: Pass(rows_R3, _table([s.pages[window] for s in segments], device, n_pages))
            for window in segments[0].pages
        }
        """By the window of the layers."""
        self._tables = {}

    def rewrite(self, segments: Sequence[Segment]) -> None:
        """Describe another pass of as many sequences, one token of each, in the same memory (on the
        CPU), for a capture that reads it."""
        for window, (rows_R3, table_RP) in self.where.items():
            rows, table = rows_R3.numpy(), table_RP.numpy()
            for i, segment in enumerate(segments):
                pages = segment.pages[window]
                table[i, : len(pages)] = pages
        self.index.numpy()[:] = rows[:, 2] = [segment.start for segment in segments]

    def prepare(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.rope(config, dtype)


def _table(pages: Sequence[Sequence[int]], device: torch.device, n_pages: int) -> Tensor:
    """Return int32 `[R, P]`, zeros behind shorter rows."""
    width = n_pages or max(map(len, pages))
    rows = [[*row, *[0] * (width - len(row))] for row in pages]
    return torch.tensor(rows, dtype=torch.int32, device=device)


class PagedCache:
    """The cache of one pass: the pages of all layers, and where this pass writes and reads."""

    def __init__(self, states: Sequence[Any], segments: Sequence[Segment]):
        self._states, self._segments = states, segments

    def positions(self, batch: int, n_new: int, device: torch.device) -> PagedPositions:
        positions = PagedPositions(self._segments, device)
        assert (batch, n_new) == (1, len(positions.index)), "a pass is one sequence of all tokens"
        return positions

    def state(self, layer: int) -> Any:
        return self._states[layer]

    def advance(self, n_new: Sequence[int]) -> None:
        """Do nothing: the next pass names its own segments."""


class PagedKV(Pages):
    """Keys and values of one layer, in pages."""

    rotates = True
    """Whether `attend` takes queries and keys that are not rotated yet."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: PagedPositions,
        window: int,
        sinks_N: Tensor | None = None,
        rotation: HeadRotation | None = None,
    ) -> Tensor:
        """Write keys and values `[1, T, M, d]` to their pages; return the attention of queries
        `[1, T, N, d]`, each to its own sequence up to its own position; queries and keys are
        rotated first."""
        arguments = (q[0], k[0], v[0], self, positions.where[window], window)
        out_TNd = paged_attention(*arguments, sinks_N=sinks_N, rotation=rotation)
        return out_TNd.unsqueeze(0)


class PagedLatent(Pages):
    """Latent vectors and rotated keys of one layer, in pages: one key head of width C + r, whose
    first C dims are the values."""

    def attend(
        self,
        q_1TNw: Tensor,
        latent_1Tw: Tensor,
        positions: PagedPositions,
        window: int,
        scale: float,
    ) -> Tensor:
        """Write `[1, T, C + r]` to their pages; return the attention of queries `[1, T, N, C + r]`,
        each to its own sequence up to its own position, `[1, T, N, C]`."""
        k_T1w = latent_1Tw[0].unsqueeze(1)
        return paged_attention(
            q_1TNw[0], k_T1w, None, self, positions.where[window], window, scale
        ).unsqueeze(0)
