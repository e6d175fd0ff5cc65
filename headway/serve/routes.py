"""The chosen experts of every cached token, page by page beside its keys and values: a prefix that
is in the cache returns its routes too.

The arrays are what `Context.replay` of training takes, layer by layer."""

from collections.abc import Sequence

import numpy as np

from headway.model.balance import RouteReport
from headway.model.moe import SparseLayer
from headway.model.paged import PAGE


class RoutePages:
    """Routes of n_pages pages, int16 `[n_pages, 16, sparse layers, H·K]`."""

    def __init__(self, n_pages: int, layers: Sequence[SparseLayer]):
        choices = max((x.config.n_heads * x.config.top_k for x in layers), default=0)
        self._routes = np.zeros((n_pages, PAGE, len(layers), choices), np.int16)

    def write(self, slot_T: Sequence[int], routes: Sequence[RouteReport | None]) -> None:
        """Store the routes of the T tokens of a pass at their slots, 16·page + offset."""
        reports = [report.index_THK.flatten(1).cpu().numpy() for report in routes if report]
        if reports:
            self._routes.reshape(-1, *self._routes.shape[2:])[slot_T] = np.stack(reports, 1)

    def copy_page(self, source: int, target: int) -> None:
        """Copy the routes of a page."""
        self._routes[target] = self._routes[source]

    def read(self, pages: Sequence[int], n_tokens: int) -> np.ndarray:
        """Return the routes of the first tokens of a sequence, `[n_tokens, layers, H·K]`."""
        return self._routes[list(pages)].reshape(-1, *self._routes.shape[2:])[:n_tokens]
