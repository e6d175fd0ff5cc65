"""Documents that are there more than once: validation text that is trained on, and repeats.

Documents are compared by hash, over all sources together; near-copies within a source:
`near_copies.py`."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headway.data.document_index import DOCUMENT, DocumentIndex
from headway.data.shard_file import Tokens


@dataclass(frozen=True)
class Overlap:
    """What validation and training share."""

    validation_documents: int
    shared: int
    """Validation documents that are trained on."""
    removed_shared: int = 0
    """Training documents that were left out since they are in validation."""
    removed_repeated: int = 0
    """Training documents that were left out since training has them already."""

    @property
    def removed(self) -> int:
        """Return how many training documents were left out."""
        return self.removed_shared + self.removed_repeated

    @property
    def sentence(self) -> str:
        """Return it as a sentence for people."""
        said = (
            f"{self.shared:,} of {self.validation_documents:,} validation documents are also in "
            "training"
        )
        if self.removed:
            said += (
                f"; left out of training: {self.removed_shared:,} documents that are in "
                f"validation, {self.removed_repeated:,} that were there already"
            )
        return said


def count(indices: Sequence[DocumentIndex]) -> Overlap:
    """Count what the sources of a run share."""
    documents = sum(index.val.tokens for index in indices)
    if len(indices) == 1:
        return Overlap(documents, indices[0].shared)
    val_hash_N = _hashes([index.documents(index.val) for index in indices])
    found_N = np.zeros(len(val_hash_N), dtype=bool)
    for index in indices:
        found_N |= np.isin(val_hash_N, index.documents(index.train)["hash"])
    return Overlap(documents, int(found_N.sum()))


def kept_documents(indices: Sequence[DocumentIndex]) -> tuple[list[np.ndarray], Overlap]:
    """Return which training documents of each source stay (bool `[documents]`): the first of each
    text that is not in validation. Validation stays as it is, so that runs can be compared on it.
    """
    train = [index.documents(index.train) for index in indices]
    val_hash_N = _hashes([index.documents(index.val) for index in indices])
    hash_N = _hashes(train)
    shared_N = np.isin(hash_N, val_hash_N)
    first_N = np.zeros(len(hash_N), dtype=bool)
    first_N[np.unique(hash_N, return_index=True)[1]] = True
    kept_N = first_N & ~shared_N
    removed = int(shared_N.sum()), int((~first_N & ~shared_N).sum())
    ends = np.cumsum([len(rows) for rows in train])
    return np.split(kept_N, ends[:-1]), Overlap(len(val_hash_N), 0, *removed)


class Kept:
    """The ids of those documents of a split that stay; see `Tokens`."""

    def __init__(self, whole: Tokens, documents_N: np.ndarray, kept_N: np.ndarray):
        """`documents_N` are DOCUMENT rows, `kept_N` says which stay."""
        self.whole, self.bytes_V = whole, whole.bytes_V
        self.documents = int(kept_N.sum())
        end_N = documents_N["end"].astype(np.int64)
        # Documents that stay side by side are one piece.
        edges = np.flatnonzero(np.diff(kept_N.astype(np.int8), prepend=0, append=0))
        first, last = edges[::2], edges[1::2]
        self._begin = np.concatenate([np.zeros(1, np.int64), end_N])[first]
        self._starts = np.concatenate([[0], np.cumsum(end_N[last - 1] - self._begin)])
        left_out = hashlib.sha256(np.packbits(kept_N).tobytes()).hexdigest()
        self.digest = hashlib.sha256(f"{whole.digest} {left_out}".encode()).hexdigest()
        """A hash of all ids in their order."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (int64 [n]) with the ids from `start` on; the first id follows the last."""
        assert 0 <= start < len(self)
        piece = bisect_right(self._starts, start) - 1
        inside, done = start - int(self._starts[piece]), 0
        while done < len(out):
            size = int(self._starts[piece + 1] - self._starts[piece]) - inside
            now = min(size, len(out) - done)
            self.whole.read(int(self._begin[piece]) + inside, out[done : done + now])
            done += now
            piece, inside = (piece + 1) % len(self._begin), 0


def _hashes(splits: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, DOCUMENT), *splits])["hash"]
