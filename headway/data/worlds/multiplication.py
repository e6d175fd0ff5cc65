"""Products of two whole numbers, digit by digit."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from headway.config import UsageError
from headway.data.worlds.draws import Draws
from headway.data.worlds.world import Items, State, check_least, hash_of, to_the_left

TIMES, EQUALS, PLUS, END = range(10, 14)


@dataclass(frozen=True)
class Multiplication:
    """`1 2 × 3 4 =`, then the digits of the product and a full stop, each of which is a target."""

    length: int = 2
    """Digits of both factors, where m and n do not say otherwise; at most 9."""
    m: int = 0
    """Digits of the first factor; 0: length."""
    n: int = 0
    """Digits of the second factor; 0: length."""
    order: Literal["msb", "lsb"] = "msb"
    """Whether the most or the least significant digit of what is written comes first; the factors
    begin with the most significant one."""
    form: Literal["direct", "scratch"] = "direct"
    """`scratch`: first the product with each digit of the second factor, from its last one on, m +
    1 digits each, with `+` between them and `=` at the end."""

    name = "multiplication"
    words = (*map(str, range(10)), "×", "=", "+", ".")

    @property
    def digits(self) -> tuple[int, int]:
        """Return m and n."""
        return self.m or self.length, self.n or self.length

    @property
    def n_tokens(self) -> int:
        """Return the prompt, and what follows it but for the full stop."""
        m, n = self.digits
        scratch = n * (m + 2) if self.form == "scratch" else 0
        return m + n + 2 + scratch + m + n

    def check(self) -> None:
        """Raise UsageError for sizes that do not fit."""
        check_least(self, 1, "length", most=9)
        check_least(self, 0, "m", "n", most=9)
        for name, known in (("order", ("msb", "lsb")), ("form", ("direct", "scratch"))):
            if vars(self)[name] not in known:
                value = vars(self)[name]
                raise UsageError(
                    f"world:multiplication has {name}={value!r}; use {' or '.join(known)}"
                )

    def draw(self, draws: Draws) -> State:
        """Return `factors` [B, 2], without leading zeros."""
        least = [10 ** (digits - 1) for digits in self.digits]
        return {"factors": np.stack([x + draws.integers(9 * x) for x in least], axis=1)}

    def content(self, state: State) -> np.ndarray:
        """Return a hash of the factors in any order."""
        return hash_of(np.sort(state["factors"], axis=1))

    def oracle(self, state: State) -> np.ndarray:
        """Return the products, [B]."""
        return state["factors"].prod(axis=1)

    def render(self, state: State, answer: np.ndarray) -> Items:
        """Write prompt, scratch-pad and product."""
        (m, n), (a_B, b_B) = self.digits, state["factors"].T
        product_BD = self._in_order(digits_of(answer, m + n))
        # the leading zero is not written
        zero_B = answer < 10 ** (m + n - 1)
        product_BD[zero_B, 0 if self.order == "msb" else -1] = -1
        prompt = [digits_of(a_B, m), TIMES, digits_of(b_B, n), EQUALS]
        text = []
        if self.form == "scratch":
            for digit_B in digits_of(b_B, n)[:, ::-1].T:
                text += [self._in_order(digits_of(a_B * digit_B, m + 1)), PLUS]
            text[-1] = EQUALS
        prompt_BT = _side_by_side(prompt, len(a_B))
        text_BT = _side_by_side([*text, product_BD, END], len(a_B))
        whole_BT = to_the_left(np.concatenate([prompt_BT, text_BT], axis=1))
        targets_BT = whole_BT[:, 1:].copy()
        targets_BT[:, : prompt_BT.shape[1] - 1] = -1
        tokens_BT = whole_BT[:, :-1].copy()
        tokens_BT[tokens_BT == END] = -1
        prompt_B = np.full(len(a_B), prompt_BT.shape[1])
        return Items(tokens_BT, targets_BT, prompt_B, to_the_left(product_BD))

    def meta(self, state: State, row: int) -> dict:
        """Return the factors and the order of the digits that are written."""
        return {"factors": state["factors"][row].tolist(), "order": self.order}

    def _in_order(self, digits_BD: np.ndarray) -> np.ndarray:
        return digits_BD if self.order == "msb" else digits_BD[:, ::-1].copy()


def digits_of(number_B: np.ndarray, n: int) -> np.ndarray:
    """Return the last n decimal digits, the most significant first, int64 [B, n]."""
    return number_B[:, None] // 10 ** np.arange(n - 1, -1, -1) % 10


def _side_by_side(parts: list[np.ndarray | int], B: int) -> np.ndarray:
    """Return columns of digits, and words that are the same in each row, as one array."""
    columns = [np.full((B, 1), part) if isinstance(part, int) else part for part in parts]
    return np.concatenate(columns, axis=1)
