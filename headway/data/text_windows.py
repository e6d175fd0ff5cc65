"""The windows of a text: stretches of the ring of its tokens; the targets are the next tokens."""

import numpy as np

from headway.data.counter_based import mix, permute, u64
from headway.data.overlap import Kept
from headway.data.shard_file import Tokens
from headway.data.shards import Source
from headway.data.windows import Rows

_U64 = np.uint64
# Salts keep the uses of one seed apart.
_SALT_ORDER, _SALT_OFFSET = 2, 3


class TextWindows:
    """The windows of one tokenised source, a `Windows`. Sample n of training belongs to epoch n //
    W, where W = tokens // seq_len. Its window is the image of n mod W under a pseudo-random
    permutation, another one in each epoch, so every epoch visits every window once. An epoch cuts
    the tokens, seen as a ring, from a random offset on: window borders move."""

    def __init__(self, source: Source, seq_len: int, seed: int, number: int):
        """`number` is that of the source in its run, which has an order of its own."""
        self.source, self.seq_len, self.seed, self.number = source, seq_len, seed, number

    @property
    def n_val(self) -> int:
        """Return the number of validation windows, of which the last may be short of targets."""
        return -(-len(self.source.val) // self.seq_len)

    @property
    def val_hashes(self) -> np.ndarray:
        """Return the hashes (uint64) of the validation documents, in order."""
        index = self.source.index
        return index.documents(index.val)["hash"]

    def starts(self, number_B: np.ndarray) -> np.ndarray:
        """Return the first token (int64 [B]) of training windows by number (uint64 [B])."""
        length = len(self.source.train)
        windows = length // self.seq_len
        key = mix(u64(self.seed), u64(self.number), number_B // _U64(windows))
        order = permute(number_B % _U64(windows), windows, mix(key, u64(_SALT_ORDER)))
        offset = mix(key, u64(_SALT_OFFSET)) % _U64(length)
        start_B = (offset + order * _U64(self.seq_len)) % _U64(length)
        return start_B.astype(np.int64)

    def train(self, number_B: np.ndarray) -> Rows:
        """Return training windows by number (uint64 [B])."""
        return self._read(self.source.train, self.starts(number_B))

    def val(self, window_B: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Return validation windows and the documents of their targets. All together they have each
        token of the split as a target exactly once: the first follows the eos of the ring, and the
        last one ends in targets of −1."""
        tokens, S = self.source.val, self.seq_len
        first_B = window_B * S
        rows = self._read(tokens, (first_B - 1) % len(tokens))
        place_BS = first_B[:, None] + np.arange(S)
        beyond_BS = place_BS >= len(tokens)
        rows.targets_BS[beyond_BS], rows.bytes_BS[beyond_BS] = -1, 0
        index = self.source.index
        end_N = index.documents(index.val)["end"].astype(np.int64)
        return rows, np.searchsorted(end_N, place_BS, side="right")

    def _read(self, tokens: Tokens | Kept, start_B: np.ndarray) -> Rows:
        """Return the windows that start at these tokens."""
        window_BS = np.empty((len(start_B), self.seq_len + 1), dtype=np.int64)
        for row, start in zip(window_BS, start_B, strict=True):
            tokens.read(int(start), row)
        tokens_BS, targets_BS = window_BS[:, :-1].copy(), window_BS[:, 1:].copy()
        return Rows(tokens_BS, targets_BS, tokens.bytes_V[targets_BS])
