"""(seed, step, rank) → tokens: a pure function with no state, so nothing to save but the step.

Sample g = step · batch_size + row. Two steps lead from g to a window, each O(1) in g:

1. Source (`pick`). The number of samples that a source gave before g is a floor of g times its
   weight, so the proportions hold at every g, to less than one sample per source in the list, and
   not only on average.
2. Window. Sample n of a source is a window of its text (`text_windows.py`), or an item of its world
   (`worlds/source.py`)."""

from functools import cached_property

import numpy as np
import torch

from headway.config import DataConfig, UsageError
from headway.data.batch import Batch, ValidationBatch
from headway.data.counter_based import mix, permute, u64
from headway.data.overlap import Kept
from headway.data.shards import Dataset, Source
from headway.data.text_windows import TextWindows
from headway.data.windows import Rows, Windows
from headway.data.worlds.source import WorldSource, WorldWindows

_U64 = np.uint64
# Salts keep the uses of one seed apart.
_SALT_PHASE, _SALT_VAL = 1, 4


class Stream:
    """Batches of a tokenised data set, training and validation."""

    def __init__(self, dataset: Dataset, config: DataConfig, seed: int):
        """Raise UsageError if the data are shorter than a batch, or a split than a window."""
        config.check()
        named = tuple(source.spec for source in dataset.sources)
        assert named == config.source, "the dataset was prepared from another config"
        self.dataset, self.config, self.seed = dataset, config, seed
        _check_size(dataset, config)
        shares = config.weights or tuple(source.train_tokens for source in dataset.sources)
        self._splits = _thresholds(shares)
        phases = mix(u64(seed), u64(_SALT_PHASE), np.arange(len(shares), dtype=_U64))
        self._phases = [int(phase) >> 32 for phase in phases]
        self.windows = [
            _windows(source, config.seq_len, seed, number)
            for number, source in enumerate(dataset.sources)
        ]

    @property
    def n_val_windows(self) -> int:
        """Return the number of windows of the full validation split."""
        return sum(windows.n_val for windows in self.windows)

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
        source_B, number_B = self.locate(_U64(step * self.config.batch_size) + row_B)
        batch_rows = self._empty(size // world)
        for s, windows in enumerate(self.windows):
            mine = source_B == s
            if mine.any():
                _put(batch_rows, mine, windows.train(number_B[mine]))
        return self._batch(batch_rows)

    @cached_property
    def val_documents(self) -> np.ndarray:
        """The hashes (uint64) of the validation documents of all sources, in order."""
        return np.concatenate([windows.val_hashes for windows in self.windows])

    def val_windows(self, begin: int, end: int) -> ValidationBatch:
        """Return windows begin … end − 1 of validation, the same ones for every batch size, mesh,
        seed and weight. Those of all sources are in one fixed shuffled order, so that the first few
        are a fair sample. Together they have each token of the split of a text as a target exactly
        once, and each item of a world."""
        total = self.n_val_windows
        assert 0 <= begin < end <= total
        place_B = np.arange(begin, end, dtype=_U64)
        key_B = np.full(len(place_B), _SALT_VAL, dtype=_U64)
        window_B = permute(place_B, total, key_B).astype(np.int64)
        rows = self._empty(len(window_B))
        document_BS = np.zeros_like(rows.targets_BS)
        before, documents = 0, 0
        for windows in self.windows:
            mine = (window_B >= before) & (window_B < before + windows.n_val)
            if mine.any():
                part, of_BS = windows.val(window_B[mine] - before)
                _put(rows, mine, part)
                document_BS[mine] = documents + of_BS
            before += windows.n_val
            documents += len(windows.val_hashes)
        return ValidationBatch(
            **vars(self._batch(rows)),
            document_BS=torch.from_numpy(document_BS * (rows.targets_BS >= 0)),
            bytes_BS=torch.from_numpy(rows.bytes_BS),
        )

    def locate(self, sample_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return source (int64 [B]) and number in it (uint64 [B]) of training samples by number
        (uint64 [B])."""
        return pick(sample_B, self._splits, self._phases)

    def _empty(self, n: int) -> Rows:
        """Return room for n windows."""
        tokens_BS = np.empty((n, self.config.seq_len), dtype=np.int64)
        return Rows(tokens_BS, np.empty_like(tokens_BS), np.empty(tokens_BS.shape))

    def _batch(self, rows: Rows) -> Batch:
        """Return windows as a batch; documents are numbered where `doc_mask` asks for it."""
        doc_BS = None
        if self.config.doc_mask:
            ended_BS = np.cumsum(rows.tokens_BS == self.dataset.eos, axis=1, dtype=np.int32)
            doc_BS = np.concatenate([np.zeros_like(ended_BS[:, :1]), ended_BS[:, :-1]], axis=1)
        return Batch(
            torch.from_numpy(rows.tokens_BS),
            torch.from_numpy(rows.targets_BS),
            None if doc_BS is None else torch.from_numpy(doc_BS),
            torch.from_numpy(rows.bytes_BS.sum(1)),
        )


def _windows(source: Source | WorldSource, seq_len: int, seed: int, number: int) -> Windows:
    match source:
        case WorldSource():
            return WorldWindows(source, seq_len, seed)
        case Source():
            return TextWindows(source, seq_len, seed, number)


def _put(into: Rows, mine: np.ndarray, rows: Rows) -> None:
    """Write windows into the rows that `mine` (bool [B]) marks."""
    for whole, part in zip(into, rows, strict=True):
        whole[mine] = part


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


def _check_size(dataset: Dataset, config: DataConfig) -> None:
    window = config.seq_len + 1
    for source in dataset.sources:
        if isinstance(source, WorldSource):
            continue
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
