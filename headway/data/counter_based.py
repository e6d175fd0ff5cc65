"""Counter-based random numbers: pure functions of a key and a place, with no state (as those of
Salmon et al. 2011, by the steps of splitmix64)."""

import numpy as np

from headway.data.document import GOLDEN, scramble

_U64 = np.uint64
_ROUNDS = 6


def mix(*parts: np.ndarray) -> np.ndarray:
    """Hash uint64 arrays, element by element, to uint64 (a chain of splitmix64 steps)."""
    value = np.zeros(1, dtype=_U64)
    for part in parts:
        value = scramble((value ^ part) * _U64(0xD1342543DE82EF95) + _U64(GOLDEN))
    return value


def permute(index_B: np.ndarray, n: int, key_B: np.ndarray) -> np.ndarray:
    """Return the image of each index (uint64, below n) under the permutation of 0 … n−1 that its
    key (uint64) names.

    A Feistel network permutes the numbers of `bits` bits, the next power of two; an image ≥ n goes
    through it again until it is below n (cycle walking; Black & Rogaway 2002), twice on average at
    most."""
    bits = max((n - 1).bit_length(), 2)
    low = _U64(bits // 2)
    masks = (_U64((1 << (bits - bits // 2)) - 1), _U64((1 << (bits // 2)) - 1))
    round_keys = [mix(key_B, u64(number)) for number in range(_ROUNDS)]
    out = index_B.astype(_U64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> low, out[todo] & masks[1]
        for number, keys in enumerate(round_keys):
            # The halves, of unequal width when `bits` is odd, change places in each round.
            left, right = right, left ^ (scramble(right ^ keys[todo]) & masks[number % 2])
        out[todo] = left << low | right
        todo = todo[out[todo] >= _U64(n)]
    return out


def u64(value: int) -> np.ndarray:
    """Return an array of one item, since numpy warns when scalars wrap around."""
    return np.array([value % (1 << 64)], dtype=_U64)
