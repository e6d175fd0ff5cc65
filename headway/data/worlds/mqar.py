"""Multi-query associative recall (MQAR; Arora et al. 2023, Zoology, arXiv 2312.04927)."""

from dataclasses import dataclass

import numpy as np

from headway.config import UsageError
from headway.data.worlds.draws import Draws
from headway.data.worlds.world import Items, State, hash_of

POWER = 0.01
"""Of the law by which the distance of a query falls: p(i) ∝ i^(POWER − 1)."""


@dataclass(frozen=True)
class Mqar:
    """Pairs of key and value, then each key once more, far from its pair or near; the target there
    is its value."""

    pairs: int = 8
    """n, pairs of an item; keys differ, and so do values."""
    length: int = 64
    """T, tokens of an item, even and ≥ 4n."""
    vocab: int = 512
    """Words: the blank, vocab/2 − 1 keys and vocab/2 values; above T."""

    name = "mqar"

    @property
    def words(self) -> tuple[str, ...]:
        """Return blank, keys and values."""
        half = self.vocab // 2
        keys = (f"k{i}" for i in range(1, half))
        return ("-", *keys, *(f"v{i}" for i in range(half)))

    @property
    def n_tokens(self) -> int:
        """Return T."""
        return self.length

    def check(self) -> None:
        """Raise UsageError for sizes that do not fit together."""
        n, T, V = self.pairs, self.length, self.vocab
        if n < 1:
            raise UsageError(f"world:mqar has pairs={n}; use 1 or more")
        if T % 2 or 4 * n > T:
            fit = max(4 * n, T + T % 2)
            raise UsageError(
                f"world:mqar with pairs={n} needs an even length of at least {4 * n}, and length "
                f"is {T}; use length {fit}"
            )
        if V % 2 or V <= T:
            raise UsageError(
                f"world:mqar with length={T} needs an even vocab above it, and vocab is {V}; use "
                f"vocab={T + 2 - T % 2}"
            )

    def draw(self, draws: Draws) -> State:
        """Return keys, values and gaps, each [B, n]: query i follows the pairs after 2·gap_i tokens
        more; gaps are drawn by the power law without replacement."""
        n, half = self.pairs, self.vocab // 2
        space = (self.length - 2 * n) // 2
        # of independent exponential waiting times the n shortest are n draws without replacement
        rate_G = np.arange(1, space + 1) ** (POWER - 1)
        wait_BG = -np.log(draws.uniform(space)) / rate_G
        return {
            "keys": 1 + draws.distinct(half - 1, n),
            "values": half + draws.distinct(half, n),
            "gaps": np.argsort(wait_BG, axis=1)[:, :n],
        }

    def content(self, state: State) -> np.ndarray:
        """Return a hash of the set of pairs."""
        pair_Bn = state["keys"] * self.vocab + state["values"]
        return hash_of(np.sort(pair_Bn, axis=1))

    def oracle(self, state: State) -> np.ndarray:
        """Return the values, in the order of the queries, [B, n]."""
        order_Bn = np.argsort(state["gaps"], axis=1)
        return np.take_along_axis(state["values"], order_Bn, axis=1)

    def render(self, state: State, answer: np.ndarray) -> Items:
        """Write pairs, then blanks with queries among them."""
        (B, n), T = state["keys"].shape, self.length
        order_Bn = np.argsort(state["gaps"], axis=1)
        place_Bn = 2 * n + 2 * np.take_along_axis(state["gaps"], order_Bn, axis=1)
        tokens_BT = np.zeros((B, T), dtype=np.int64)
        tokens_BT[:, : 2 * n : 2], tokens_BT[:, 1 : 2 * n : 2] = state["keys"], state["values"]
        query_Bn = np.take_along_axis(state["keys"], order_Bn, axis=1)
        np.put_along_axis(tokens_BT, place_Bn, query_Bn, axis=1)
        targets_BT = np.full((B, T), -1, dtype=np.int64)
        np.put_along_axis(targets_BT, place_Bn, answer, axis=1)
        return Items(tokens_BT, targets_BT, np.full(B, T), answer)

    def meta(self, state: State, row: int) -> dict:
        """Return the number of pairs: they are the first 2n tokens."""
        return {"pairs": self.pairs}
