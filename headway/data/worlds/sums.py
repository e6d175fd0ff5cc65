"""Sums, place by place, in several languages of the same meaning."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from headway.config import UsageError
from headway.data.counter_based import u64
from headway.data.worlds.draws import Draws, key_of
from headway.data.worlds.world import Items, State, check_least, hash_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
"""A word begins with the letter of its language."""


@dataclass(frozen=True)
class Sums:
    """`a1 a2 a+ a3 a9 a=`, then the digits of the sum without carry, `a4 a1`, each of which is a
    target. Each language has words of its own for the digits, plus and equals, and an order of its
    own for what comes before equals, and for the answer; language 0 has the order of arithmetic."""

    length: int = 3
    """Digits of both summands."""
    base: int = 10
    """Digits are below it; 2 … 10."""
    language: int = 0
    """Number of the language that items are written in."""
    languages: int = 1
    """Languages whose words the vocabulary has: a model can be asked in one it never saw."""
    order: Literal["own", "same"] = "own"
    """`same`: all languages have the order of arithmetic, and differ in their words alone."""

    name = "sums"

    @property
    def words(self) -> tuple[str, ...]:
        """Return digits, plus and equals, language by language."""
        symbols = (*map(str, range(self.base)), "+", "=")
        return tuple(letter + x for letter in LETTERS[: self.languages] for x in symbols)

    @property
    def n_tokens(self) -> int:
        """Return summands, plus, equals, and all but the last digit of the sum."""
        return 3 * self.length + 1

    def check(self) -> None:
        """Raise UsageError for sizes that do not fit together."""
        check_least(self, 1, "length", most=18)
        check_least(self, 2, "base", most=10)
        check_least(self, 1, "languages", most=len(LETTERS))
        if not 0 <= self.language < self.languages:
            raise UsageError(
                f"world:sums has language={self.language} of languages={self.languages}; use "
                f"languages={self.language + 1} or more"
            )
        if self.order not in ("own", "same"):
            raise UsageError(f"world:sums has order={self.order!r}; use own or same")

    def draw(self, draws: Draws) -> State:
        """Return `summands` [B, 2, length], the most significant digit first."""
        return {"summands": draws.integers(self.base, 2, self.length)}

    def content(self, state: State) -> np.ndarray:
        """Return a hash of the summands in any order, the same in all languages."""
        return hash_of(np.sort(state["summands"] @ 10 ** np.arange(self.length)[::-1], axis=1))

    def oracle(self, state: State) -> np.ndarray:
        """Return the digits of the sums, [B, length]."""
        return state["summands"].sum(1) % self.base

    def render(self, state: State, answer: np.ndarray) -> Items:
        """Write summands, equals and sum in the words and the order of the language."""
        B, n = answer.shape
        sides, plus_B1 = state["summands"], np.full((B, 1), self.base)
        before = np.concatenate([sides[:, 0], plus_B1, sides[:, 1]], axis=1)
        before, said = before[:, self._order(2 * n + 1)], answer[:, self._order(n)]
        prompt = np.concatenate([before, np.full((B, 1), self.base + 1)], axis=1)
        first = (self.base + 2) * self.language
        tokens_BT = np.concatenate([prompt, said[:, :-1]], axis=1) + first
        none = np.full((B, 2 * n + 1), -1)
        targets_BT = np.concatenate([none, said + first], axis=1)
        return Items(tokens_BT, targets_BT, np.full(B, 2 * n + 2), said + first)

    def meta(self, state: State, row: int) -> dict:
        """Return the summands and the language."""
        first, second = ("".join(map(str, digits)) for digits in state["summands"][row])
        return {"summands": [first, second], "language": self.language}

    def _order(self, n: int) -> np.ndarray:
        """Return which of n words stands at each place, int64 [n]."""
        if self.order == "same" or not self.language:
            return np.arange(n)
        key = key_of(f"sums|{self.language}|{n}")
        return Draws(key, u64(0), u64(0)).distinct(n, n)[0]
