"""Documents that are nearly the same, found by MinHash (Broder 1997) with datasketch (extra
`[data]`).

A document is the set of its runs of five words. Two are near-duplicates where the Jaccard
similarity of those sets, estimated from 128 minima, is at least 0.8; a cluster is whatever such
pairs join. Texts are looked at within one source.

N documents · 128 minima of each."""

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from headway.data.files import extra

MINIMA = 128
SIMILARITY = 0.8
WORDS = 5
"""Words of a run."""
RUNS = 1 << 16
"""Runs that are hashed at once: 64 MB of products."""
SCHEME = "affine64"
"""How datasketch permutes: another one gives other minima."""

NONE = np.full(MINIMA, ~np.uint64(0))
"""The minima of no text."""

_WORD = re.compile(r"\w+|[^\w\s]")
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Clusters(NamedTuple):
    """Which documents go together."""

    leader_N: np.ndarray
    """int64: the first document of each document's cluster, itself if it is alone."""
    clusters: int
    """With more than one document."""
    documents: int
    """In those."""

    def copied_bytes(self, bytes_N: np.ndarray, is_val_N: np.ndarray) -> int:
        """Return how many bytes of validation have a near-copy in training, were documents split
        as `is_val_N` says."""
        trained = np.zeros(len(self.leader_N), dtype=bool)
        trained[self.leader_N[~is_val_N]] = True
        return int(bytes_N[is_val_N & trained[self.leader_N]].sum())


def check_installed(what: str = "data.near_duplicates=cluster") -> None:
    """Raise UsageError, which names what needs it, where datasketch is not installed."""
    extra("datasketch", what)


def minima(text: str) -> np.ndarray:
    """Return the minima of a text, uint64 `[128]`. Those of a document in pieces are the least of
    its pieces (runs across their borders are not seen). A text of fewer than five words is one
    run."""
    datasketch = extra("datasketch", "data.near_duplicates=cluster")
    sketch = datasketch.MinHash(MINIMA, hashfunc=int, scheme=SCHEME)
    for hashes in _runs(text):
        sketch.update_batch(hashes.tolist())
    return sketch.hashvalues


def _runs(text: str) -> Iterator[np.ndarray]:
    """Yield hashes of the runs of five words, uint64, in batches without repeats."""
    words = _WORD.findall(text)
    hash_W = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    for first in range(0, max(len(words) - WORDS + 1, 1), RUNS):
        part_W = hash_W[first : first + RUNS + WORDS - 1]
        n = max(len(part_W) - WORDS + 1, 1)
        run_R = np.zeros(n, dtype=np.uint64)
        for place in range(min(WORDS, len(part_W))):
            run_R = (run_R ^ part_W[place : place + n]) * _MIX
            run_R ^= run_R >> np.uint64(29)
        yield np.unique(run_R)


def clusters(minima_NM: np.ndarray) -> Clusters:
    """Return the clusters of documents by their minima, uint64 `[N, 128]`. A document without text
    (`NONE`) is in none."""
    datasketch = extra("datasketch", "data.near_duplicates=cluster")
    index = datasketch.MinHashLSH(threshold=SIMILARITY, num_perm=MINIMA)
    leader_N = np.arange(len(minima_NM))

    def leader(n: int) -> int:
        while leader_N[n] != n:
            leader_N[n] = leader_N[leader_N[n]]
            n = int(leader_N[n])
        return n

    for n, minima_M in enumerate(minima_NM):
        if (minima_M == NONE).all():
            continue
        sketch = datasketch.LeanMinHash(seed=1, hashvalues=minima_M, scheme=SCHEME)
        for other in index.query(sketch):
            if (minima_NM[other] == minima_M).mean() >= SIMILARITY:
                first, second = sorted((leader(n), leader(other)))
                leader_N[second] = first
        index.insert(n, sketch, check_duplication=False)
    leader_N = np.array([leader(n) for n in range(len(leader_N))], dtype=np.int64)
    _, size_C = np.unique(leader_N, return_counts=True)
    return Clusters(leader_N, int((size_C > 1).sum()), int(size_C[size_C > 1].sum()))
