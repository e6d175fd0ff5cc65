"""How a loss is distributed over the places of a window, and over tokens, of which a few may hold
most of it (a low mean hides confident mistakes; arXiv 2601.22950)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

QUANTILES = (50.0, 90.0, 99.0, 99.9)
"""In percent."""


class TokenLosses:
    """The losses of the targets of an evaluation. All are kept: 4 bytes each."""

    def __init__(self) -> None:
        self._nats: list[np.ndarray] = []
        self._sums_2S = np.zeros((2, 0))

    def add(self, nats_BS: Tensor, targets_BS: Tensor) -> None:
        """Add −log p of the targets of windows, which begin at the same place; −1 is none."""
        nats, asked = nats_BS.float().cpu().numpy(), (targets_BS >= 0).cpu().numpy()
        self._nats.append(nats[asked])
        if not self._sums_2S.size:
            self._sums_2S = np.zeros((2, nats.shape[1]))
        self._sums_2S += np.stack([(nats.astype(np.float64) * asked).sum(0), asked.sum(0)])

    def merge(self, others: Sequence["TokenLosses"]) -> None:
        """Add the losses of other windows, as other ranks have them."""
        for other in others:
            self._nats += other._nats
            if not self._sums_2S.size:
                self._sums_2S = np.zeros_like(other._sums_2S)
            if other._sums_2S.size:
                self._sums_2S += other._sums_2S

    def quantiles(self) -> dict[str, float]:
        """Return the loss in nats that so many percent of the targets stay below, and the largest:
        `50`, `90`, `99`, `99.9`, `max`."""
        nats_N = np.concatenate(self._nats)
        values = np.percentile(nats_N, QUANTILES)
        named = {f"{q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}
        return {**named, "max": float(nats_N.max())}

    def by_position(self) -> list[dict[str, Any]]:
        """Return the mean loss in nats at the positions of a window, 0, 1, 2–3, 4–7, …: `first`,
        `last`, `nats` and `targets` of each stretch that has targets."""
        rows, (nats_S, targets_S) = [], self._sums_2S
        first, size = 0, len(nats_S)
        while first < size:
            last = min(max(2 * first - 1, first), size - 1)
            n = targets_S[first : last + 1].sum()
            if n:
                mean = float(nats_S[first : last + 1].sum() / n)
                rows.append({"first": first, "last": last, "nats": mean, "targets": int(n)})
            first = last + 1
        return rows

    def sentences(self) -> tuple[str, str]:
        """Return both for people."""
        high = ", ".join(
            f"{name if name == 'max' else name + '%'} {value:.2f}"
            for name, value in self.quantiles().items()
        )
        places = ", ".join(
            f"{row['first']}{'' if row['first'] == row['last'] else '–' + str(row['last'])} "
            f"{row['nats']:.2f}"
            for row in self.by_position()
        )
        return f"nats of a token: {high}", f"nats by position in the window: {places}"
