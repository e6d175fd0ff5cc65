"""A cache in pages: the tokens of many sequences, of different lengths, in one pass.

A pass holds the T new tokens of all its sequences one after another, as one sequence `[1, T]`:

    tokens     a5 a6 a7 | b40 | c0 c1 …        index    5 6 7 40 0 1 …
    segments   a: 0–2     b: 3  c: 4–5 …

T tokens · M key/value heads · d head width."""

from collections.abc import Sequence
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
    pages: Sequence[int]
    """The pages of the sequence, with room for the new tokens."""


def slots_of(segments: Sequence[Segment]) -> list[int]:
    """Return where each new token of a pass is written, 16·page + offset."""
    return [
        PAGE * s.pages[i // PAGE] + i % PAGE
        for s in segments
        for i in range(s.start, s.start + s.n_new)
    ]


class PagedPositions(Positions):
    """Positions of the tokens of a pass, and the pages of their sequences.

    `n_pages`: room in the table for the pages of a sequence; 0: what these have."""

    make_tables = staticmethod(rope_rows)

    def __init__(self, segments: Sequence[Segment], device: torch.device, n_pages: int = 0):
        self.device, self.ragged = device, False
        width = n_pages or max(len(segment.pages) for segment in segments)
        table = [[*s.pages, *[0] * (width - len(s.pages))] for s in segments]
        index = [i for s in segments for i in range(s.start, s.start + s.n_new)]
        firsts = [0, *accumulate(s.n_new for s in segments)]
        rows = [(first, s.n_new, s.start) for first, s in zip(firsts, segments, strict=False)]
        self.index = torch.tensor(index, device=device)
        self.where = Pass(
            torch.tensor(rows, device=device), torch.tensor(table, dtype=torch.int32, device=device)
        )
        self._tables = {}

    def rewrite(self, segments: Sequence[Segment]) -> None:
        """Describe another pass of as many sequences, one token of each, in the same memory (on the
        CPU), for a capture that reads it."""
        index, rows, table = (t.numpy() for t in (self.index, *self.where))
        for i, segment in enumerate(segments):
            index[i] = rows[i, 2] = segment.start
            table[i, : len(segment.pages)] = segment.pages

    def prepare(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.rope(config, dtype)


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
        arguments = (q[0], k[0], v[0], self, positions.where, window)
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
            q_1TNw[0], k_T1w, None, self, positions.where, window, scale
        ).unsqueeze(0)
