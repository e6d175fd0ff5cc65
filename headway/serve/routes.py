"""The chosen experts of every cached token and their gates, page by page beside its keys and
values: a prefix that is in the cache returns its routes too."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from headway.model.balance import RouteReport
from headway.model.moe import SparseLayer
from headway.model.paged import PAGE


class Routes(NamedTuple):
    """The routes of consecutive tokens."""

    experts: np.ndarray
    """int16 `[tokens, sparse layers, H·K]`, best first, from E on for one that does nothing: layer
    by layer what `Context.replay` of training takes."""
    gates: np.ndarray
    """float32 of the same shape."""


def joined_routes(parts: Sequence[Routes]) -> Routes:
    """Return the routes of the tokens of all parts, in order."""
    return Routes(*map(np.concatenate, zip(*parts, strict=True)))


class RoutePages:
    """Routes of n_pages pages of 16 tokens."""

    def __init__(self, n_pages: int, layers: Sequence[SparseLayer]):
        choices = max((x.config.n_heads * x.config.top_k for x in layers), default=0)
        shape = (n_pages, PAGE, len(layers), choices)
        self._pages = Routes(np.zeros(shape, np.int16), np.zeros(shape, np.float32))

    def write(self, slot_T: Sequence[int], routes: Sequence[RouteReport | None]) -> None:
        """Store the routes of the T tokens of a pass at their slots, 16·page + offset."""
        reports = [report for report in routes if report]
        parts = ([r.index_THK for r in reports], [r.gate_THK for r in reports])
        for pages, part in zip(self._pages, parts if reports else (), strict=False):
            rows = torch.stack(part, 1).flatten(2).cpu().numpy()
            pages.reshape(-1, *pages.shape[2:])[slot_T] = rows

    def copy_page(self, source: int, target: int) -> None:
        """Copy the routes of a page."""
        for pages in self._pages:
            pages[target] = pages[source]

    def read(self, pages: Sequence[int], start: int, end: int) -> Routes:
        """Return the routes of tokens `start` … `end` − 1 of a sequence."""
        first, held = start // PAGE, list(pages[start // PAGE :])
        rows = slice(start - PAGE * first, end - PAGE * first)
        return Routes(*(x[held].reshape(-1, *x.shape[2:])[rows] for x in self._pages))
