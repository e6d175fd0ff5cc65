"""Copying a string of bits."""

from dataclasses import dataclass

import numpy as np

from headway.data.worlds.draws import Draws
from headway.data.worlds.world import Items, State, check_least, hash_of

BAR = 2
"""The word after which the copy begins."""


@dataclass(frozen=True)
class Copy:
    """Random bits, a bar, and the same bits again, each of which is a target."""

    length: int = 8
    """Bits of an item."""

    name = "copy"
    words = ("0", "1", "|")

    @property
    def n_tokens(self) -> int:
        """Return bits, bar, and all but the last bit of the copy, which nothing follows."""
        return 2 * self.length

    def check(self) -> None:
        """Raise UsageError for sizes that do not fit."""
        check_least(self, 1, "length")

    def draw(self, draws: Draws) -> State:
        """Return `bits` [B, length]."""
        return {"bits": draws.integers(2, self.length)}

    def content(self, state: State) -> np.ndarray:
        """Return a hash of the bits."""
        return hash_of(state["bits"])

    def oracle(self, state: State) -> np.ndarray:
        """Return the bits."""
        return state["bits"]

    def render(self, state: State, answer: np.ndarray) -> Items:
        """Write bits, bar and copy."""
        B, n = state["bits"].shape
        bar_B1, none = np.full((B, 1), BAR), np.full((B, n), -1)
        tokens_BT = np.concatenate([state["bits"], bar_B1, answer[:, :-1]], axis=1)
        return Items(tokens_BT, np.concatenate([none, answer], axis=1), np.full(B, n + 1), answer)

    def meta(self, state: State, row: int) -> dict:
        """Return the bits."""
        return {"bits": state["bits"][row].tolist()}
