"""A source as windows of S tokens with targets: all that a stream knows of it."""

from typing import NamedTuple, Protocol

import numpy as np


class Rows(NamedTuple):
    """B windows."""

    tokens_BS: np.ndarray
    """int64."""
    targets_BS: np.ndarray
    """int64; −1 where there is nothing to predict."""
    bytes_BS: np.ndarray
    """float64, bytes of text that a target stands for; 0 without a target."""


class Windows(Protocol):
    """The windows of one source. Training may go on for ever; validation is finite."""

    @property
    def n_val(self) -> int:
        """Return the number of validation windows."""
        ...

    @property
    def val_hashes(self) -> np.ndarray:
        """Return the hashes (uint64) of the validation documents, in order."""
        ...

    def train(self, number_B: np.ndarray) -> Rows:
        """Return training windows by number (uint64 [B]), in the order of the seed."""
        ...

    def val(self, window_B: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Return validation windows by number (int64 [B]), and the number of the document of each
        target among those of the source, int64 [B, S]."""
        ...
