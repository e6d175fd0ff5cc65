"""The random numbers of items: each item's follow from its key alone, whoever else is drawn."""

import hashlib

import numpy as np

from headway.data.counter_based import mix, permute, u64
from headway.data.document import GOLDEN, scramble

_U64 = np.uint64


def key_of(text: str) -> int:
    """Return the 64-bit key that a text names."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class Draws:
    """A splitmix64 generator for each of B items. Each call goes on where the last one ended."""

    def __init__(self, key: int, index_B: np.ndarray, attempt_B: np.ndarray):
        """Take a key, the numbers of the items (uint64 [B]), and how often each was drawn."""
        self._state_B = mix(u64(key), index_B.astype(_U64), attempt_B)
        self._next = 1

    def bits(self, *shape: int) -> np.ndarray:
        """Return uint64 [B, *shape]."""
        n = int(np.prod(shape, dtype=np.int64))
        step_N = np.arange(self._next, self._next + n, dtype=_U64) * _U64(GOLDEN)
        self._next += n
        bits_BN = scramble(self._state_B[:, None] + step_N)
        return bits_BN.reshape(len(bits_BN), *shape)

    def integers(self, below: int | np.ndarray, *shape: int) -> np.ndarray:
        """Return int64 [B, *shape], uniform from 0 to `below` − 1 (< 2³², where arrays: one for
        each), with a bias of less than 2⁻³² · below."""
        high = self.bits(*shape) >> _U64(32)
        return ((high * np.asarray(below, dtype=_U64)) >> _U64(32)).astype(np.int64)

    def uniform(self, *shape: int) -> np.ndarray:
        """Return float64 [B, *shape] in (0, 1]."""
        return ((self.bits(*shape) >> _U64(11)).astype(np.float64) + 1) * 2.0**-53

    def distinct(self, below: int, n: int) -> np.ndarray:
        """Return int64 [B, n]: n different numbers below `below`, in random order."""
        assert n <= below
        key_B = self.bits()
        place_N = np.tile(np.arange(n, dtype=_U64), len(key_B))
        image = permute(place_N, below, np.repeat(key_B, n))
        return image.reshape(-1, n).astype(np.int64)
