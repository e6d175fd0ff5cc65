"""A cache in pages: the tokens of many sequences, of different lengths, in one pass.

A pass holds the T new tokens of all its sequences one after another, as one sequence `[1, T]`. Page
`table_RP[r, i]` holds positions 16·i … 16·i + 15 of sequence r:

    tokens     a5 a6 a7 | b40 | c0 c1 …        index_T    5 6 7 40 0 1 …
    segments   a: 0–2     b: 3  c: 4–5 …       request_T  0 0 0 1  2 2 …

T tokens · R sequences of a pass · P pages of the longest of them · M key/value heads · d head
width."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.kernels.attention import attention, causal_mask
from headway.model.context import Positions

PAGE = 16
"""Positions of a page."""


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
    """Positions of the tokens of a pass, and the pages of their sequences."""

    def __init__(self, segments: Sequence[Segment], device: torch.device):
        self.segments, self.device, self.ragged = segments, device, False
        width = max(len(segment.pages) for segment in segments)
        table = [[*s.pages, *[0] * (width - len(s.pages))] for s in segments]
        index = [i for s in segments for i in range(s.start, s.start + s.n_new)]
        request = [r for r, s in enumerate(segments) for _ in range(s.n_new)]
        self.table_RP = torch.tensor(table, dtype=torch.int32, device=device)
        self.index = torch.tensor(index, device=device)
        self.request_T = torch.tensor(request, dtype=torch.int32, device=device)
        self.slot_T = PAGE * self.table_RP[self.request_T, self.index // PAGE] + self.index % PAGE
        self._tables = {}

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


class PagedKV:
    """Keys and values of one layer, `[n_pages, 16, M, d]`."""

    def __init__(
        self, n_pages: int, n_heads: int, d_head: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (n_pages, PAGE, n_heads, d_head)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        """Return the size of all pages."""
        return self.k.nbytes + self.v.nbytes

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page, for sequences that share all before it and now write it differently."""
        self.k[target], self.v[target] = self.k[source], self.v[source]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: PagedPositions, window: int
    ) -> Tensor:
        """Write keys and values `[1, T, M, d]` to their pages; return the attention of queries
        `[1, T, N, d]`, each to its own sequence up to its own position."""
        self.k.flatten(0, 1)[positions.slot_T] = k[0]
        self.v.flatten(0, 1)[positions.slot_T] = v[0]
        outputs, done = [], 0
        for segment in positions.segments:
            end = segment.start + segment.n_new
            n_pages = -(-end // PAGE)
            page = torch.tensor(segment.pages[:n_pages], device=q.device)
            keys, values = (t[page].flatten(0, 1)[:end].unsqueeze(0) for t in (self.k, self.v))
            index = positions.index[done : done + segment.n_new]
            first = (index - window + 1).clamp(min=0) if window else None
            mask = causal_mask(index, end, first)
            outputs.append(attention(q[:, done : done + segment.n_new], keys, values, mask))
            done += segment.n_new
        return torch.cat(outputs, 1)
