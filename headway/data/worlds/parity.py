"""The parity of a string of bits."""

from dataclasses import dataclass

import numpy as np

from headway.data.worlds.draws import Draws
from headway.data.worlds.world import Items, State, check_least, hash_of


@dataclass(frozen=True)
class Parity:
    """Random bits; the target at the last one is their sum modulo 2."""

    length: int = 16
    """Bits of an item."""
    running: int = 0
    """1: the parity of the bits so far is a target at every bit."""

    name = "parity"
    words = ("0", "1")

    @property
    def n_tokens(self) -> int:
        """Return the bits."""
        return self.length

    def check(self) -> None:
        """Raise UsageError for sizes that do not fit."""
        check_least(self, 1, "length")
        check_least(self, 0, "running", most=1)

    def draw(self, draws: Draws) -> State:
        """Return `bits` [B, length]."""
        return {"bits": draws.integers(2, self.length)}

    def content(self, state: State) -> np.ndarray:
        """Return a hash of the bits."""
        return hash_of(state["bits"])

    def oracle(self, state: State) -> np.ndarray:
        """Return the parity of the bits so far, [B, length]."""
        return np.bitwise_xor.accumulate(state["bits"], axis=1)

    def render(self, state: State, answer: np.ndarray) -> Items:
        """Write the bits."""
        bits_BT = state["bits"]
        targets_BT = answer.copy()
        if not self.running:
            targets_BT[:, :-1] = -1
        return Items(bits_BT, targets_BT, np.full(len(bits_BT), self.length), answer[:, -1:])

    def meta(self, state: State, row: int) -> dict:
        """Return the bits."""
        return {"bits": state["bits"][row].tolist()}
