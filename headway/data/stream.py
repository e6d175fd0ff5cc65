"""(seed, step, rank) → tokens: a pure function with no state, so nothing to save but the step.

Sample g = step · batch_size + row. Three steps lead from g to a window of text, each O(1) in g:

1. Source (`pick`). The number of samples that a source gave before g is a floor of g times its
   weight, so the proportions hold at every g, to less than one sample per source in the list, and
   not only on average.
2. Window (`permute`). Sample n of a source belongs to epoch n // W, where W = tokens // seq_len.
   Its window is the image of n mod W under a pseudo-random permutation, another one in each epoch,
   so every epoch visits every window once.
3. Place. An epoch cuts the tokens, seen as a ring, from a random offset on: window borders move."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from headway.config import DataConfig, UsageError
from headway.data.batch import Batch, ValidationBatch
from headway.data.document import GOLDEN, scramble
from headway.data.overlap import Kept
from headway.data.shard_file import Tokens
from headway.data.shards import Dataset

_U64 = np.uint64
_ROUNDS = 6
# Salts keep the uses of one seed apart.
_SALT_PHASE, _SALT_ORDER, _SALT_OFFSET, _SALT_VAL = 1, 2, 3, 4


class Stream:
    """Batches of a tokenised data set, training and validation."""

    def __init__(self, dataset: Dataset, config: DataConfig, seed: int):
        """Raise UsageError if the data are shorter than a batch, or a split than a window."""
        config.check()
        named = tuple(source.spec for source in dataset.sources)
        assert named == config.source, "the dataset was prepared from another config"
        self.dataset, self.config, self.seed = dataset, config, seed
        _check_size(dataset, config)
        shares = config.weights or tuple(len(source.train) for source in dataset.sources)
        self._splits = _thresholds(shares)
        phases = mix(_u64(seed), _u64(_SALT_PHASE), np.arange(len(shares), dtype=_U64))
        self._phases = [int(phase) >> 32 for phase in phases]
        self._val_windows = [-(-len(source.val) // config.seq_len) for source in dataset.sources]

    @property
    def n_val_windows(self) -> int:
        """Return the number of windows of the full validation split."""
        return sum(self._val_windows)

    def batch(
        self, step: int, rank: int = 0, world: int = 1, micro: int = 0, rows: int = 0
    ) -> Batch:
        """Return the rows of the global batch of `step` that `rank` takes: with micro-batches of
        `micro` rows (0: one), the i-th of all ranks together are rows i·world·micro … of the batch,
        in rank order, so that `world` ranks see what one process with micro-batches of world·micro
        rows sees. With `rows` only so many of the batch count, its first ones. Raise UsageError if
        the sizes do not divide."""
        size = rows or self.config.batch_size
        if size % world:
            fit = -(-size // world) * world
            raise UsageError(f"{world} ranks do not divide batch_size={size}; use batch_size {fit}")
        micro = micro or size // world
        assert 0 <= rank < world and step >= 0 and size % (world * micro) == 0
        assert size <= self.config.batch_size
        row_B = np.arange(size, dtype=_U64).reshape(-1, world, micro)[:, rank].flatten()
        source_B, start_B = self.locate(_U64(step * self.config.batch_size) + row_B)
        return self._read([self.dataset.sources[s].train for s in source_B], start_B)

    @cached_property
    def val_documents(self) -> np.ndarray:
        """The hashes (uint64) of the validation documents of all sources, in order."""
        indices = [source.index for source in self.dataset.sources]
        return np.concatenate([index.documents(index.val)["hash"] for index in indices])

    def val_windows(self, begin: int, end: int) -> ValidationBatch:
        """Return windows begin … end − 1 of validation, the same ones for every batch size, mesh,
        seed and weight. Those of all sources are in one fixed shuffled order, so that the first few
        are a fair sample. Together they have each token of the split as a target exactly once: the
        first follows the eos of the ring, and the last window of a source ends in targets of −1."""
        size, total = self.config.seq_len, self.n_val_windows
        assert 0 <= begin < end <= total
        place_B = np.arange(begin, end, dtype=_U64)
        key_B = np.full(len(place_B), _SALT_VAL, dtype=_U64)
        window_B = permute(place_B, total, key_B).astype(np.int64)
        ends = np.cumsum(self._val_windows)
        source_B = np.searchsorted(ends, window_B, side="right")
        first_B = (window_B - (ends - self._val_windows)[source_B]) * size
        tokens_B = [self.dataset.sources[s].val for s in source_B]
        length_B = np.array([len(tokens) for tokens in tokens_B])
        batch = self._read(tokens_B, (first_B - 1) % length_B, length_B - first_B)
        document_BS = self._documents(source_B, first_B) * (batch.targets_BS.numpy() >= 0)
        bytes_BS = np.stack(
            [t.bytes_V[row] for t, row in zip(tokens_B, batch.targets_BS.numpy(), strict=True)]
        ) * (batch.targets_BS.numpy() >= 0)
        return ValidationBatch(
            **vars(batch),
            document_BS=torch.from_numpy(document_BS),
            bytes_BS=torch.from_numpy(bytes_BS),
        )

    def _documents(self, source_B: np.ndarray, first_B: np.ndarray) -> np.ndarray:
        """Return the number of the document of each of S validation tokens from `first_B` on,
        int64 [B, S]."""
        place_BS = first_B[:, None] + np.arange(self.config.seq_len)
        before, document_BS = 0, np.empty_like(place_BS)
        for s, source in enumerate(self.dataset.sources):
            end_N = source.index.documents(source.index.val)["end"].astype(np.int64)
            mine = source_B == s
            document_BS[mine] = before + np.searchsorted(end_N, place_BS[mine], side="right")
            before += len(end_N)
        return document_BS

    def locate(self, sample_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return source and first token (int64 [B] each) of samples by number (uint64 [B])."""
        source_B, count_B = pick(sample_B, self._splits, self._phases)
        start_B = np.empty(len(sample_B), dtype=np.int64)
        for s, source in enumerate(self.dataset.sources):
            mine = source_B == s
            n = count_B[mine]
            length = len(source.train)
            windows = length // self.config.seq_len
            key = mix(_u64(self.seed), _u64(s), n // _u64(windows))
            order = permute(n % _u64(windows), windows, mix(key, _u64(_SALT_ORDER)))
            offset = mix(key, _u64(_SALT_OFFSET)) % _u64(length)
            start_B[mine] = (offset + order * _u64(self.config.seq_len)) % _u64(length)
        return source_B, start_B

    def _read(
        self,
        tokens_B: Sequence[Tokens | Kept],
        start_B: np.ndarray,
        most_B: np.ndarray | None = None,
    ) -> Batch:
        """Return the windows that start at these tokens, each with its first `most_B` targets."""
        window_BS = np.empty((len(start_B), self.config.seq_len + 1), dtype=np.int64)
        for row, tokens, start in zip(window_BS, tokens_B, start_B, strict=True):
            tokens.read(int(start), row)
        doc_BS = None
        if self.config.doc_mask:
            ended_BS = np.cumsum(window_BS[:, :-1] == self.dataset.eos, axis=1, dtype=np.int32)
            doc_BS = np.concatenate([np.zeros_like(ended_BS[:, :1]), ended_BS[:, :-1]], axis=1)
        tokens_BS, targets_BS = window_BS[:, :-1].copy(), window_BS[:, 1:].copy()
        bytes_BS = np.stack([t.bytes_V[row] for t, row in zip(tokens_B, targets_BS, strict=True)])
        if most_B is not None:
            beyond_BS = np.arange(self.config.seq_len) >= most_B[:, None]
            targets_BS[beyond_BS], bytes_BS[beyond_BS] = -1, 0
        return Batch(
            torch.from_numpy(tokens_BS),
            torch.from_numpy(targets_BS),
            None if doc_BS is None else torch.from_numpy(doc_BS),
            torch.from_numpy(bytes_BS.sum(1)),
        )


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
    round_keys = [mix(key_B, _u64(number)) for number in range(_ROUNDS)]
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


def pick(
    sample_B: np.ndarray, splits: list[int], phases: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the source (int64 [B]) of each global sample number g (uint64 [B]), and how many
    samples before g that source gave (uint64).

    One source after the other takes its share p/2³² of what the earlier ones left: it takes sample
    g exactly if (g·p + phase) // 2³² steps up from g to g + 1. That floor is also the count; the
    others go on with g minus it."""
    source_B = np.full(len(sample_B), len(splits), dtype=np.int64)
    count_B = sample_B.copy()
    left = np.arange(len(sample_B))
    for s, (share, phase) in enumerate(zip(splits, phases, strict=False)):
        g = count_B[left]
        before, after = _taken(g, share, phase), _taken(g + _U64(1), share, phase)
        takes = after > before
        source_B[left[takes]] = s
        count_B[left[takes]] = before[takes]
        left = left[~takes]
        count_B[left] = g[~takes] - before[~takes]
    return source_B, count_B


def _taken(g: np.ndarray, share: int, phase: int) -> np.ndarray:
    """Return (g·share + phase) // 2³² for share, phase < 2³², without overflow up to g = 2⁶³."""
    high, low = g >> _U64(32), g & _U64(0xFFFFFFFF)
    return high * _U64(share) + ((low * _U64(share) + _U64(phase)) >> _U64(32))


def _thresholds(shares: tuple[float, ...] | tuple[int, ...]) -> list[int]:
    """Return the share of each source but the last of what those before it leave, times 2³²."""
    largest = max(shares)  # relative to it first, so that huge weights do not overflow
    relative = [share / largest for share in shares]
    rest = [sum(relative[s:]) for s in range(len(relative))]
    return [
        min(max(round(2**32 * w / r), 1), 2**32 - 1)
        for w, r in zip(relative[:-1], rest[:-1], strict=True)
    ]


def _u64(value: int) -> np.ndarray:
    """Return an array of one item, since numpy warns when scalars wrap around."""
    return np.array([value % (1 << 64)], dtype=_U64)


def _check_size(dataset: Dataset, config: DataConfig) -> None:
    window = config.seq_len + 1
    for source in dataset.sources:
        parts = (
            ("training", source.train, "give"),
            ("validation", source.val, "raise val_fraction or give"),
        )
        for name, tokens, fix in parts:
            if len(tokens) < window:
                if isinstance(tokens, Kept):
                    fix = "leave out that source or data.dedup=exact, or give"
                elif config.skip_bad and name == "validation":
                    fix = "mend the documents that were skipped, raise val_fraction or give"
                raise UsageError(
                    f"source {source.spec!r} has {len(tokens):,} {name} tokens, one window needs "
                    f"{window:,} (seq_len + 1); lower seq_len, {fix} more text"
                )
    had, needed = dataset.train_tokens, config.batch_size * config.seq_len + 1
    if had < needed:
        raise UsageError(
            f"the data have {had:,} training tokens, one batch needs {needed:,} (batch_size "
            f"{config.batch_size} × seq_len {config.seq_len} + 1); lower one or give more text"
        )
