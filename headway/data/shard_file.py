"""Token ids on disk, little-endian uint16 or uint32: the shard files of a split."""

import hashlib
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from headway.config import UsageError

SHARD_TOKENS = 1 << 26
"""Largest shard, in tokens (128 MiB of uint16)."""
# Shards up to this size are always hashed whole.
WHOLE_HASH_BYTES = 16 << 20
SAMPLE_BLOCKS, SAMPLE_BYTES = 256, 4096


def damaged(folder: Path, what: str) -> UsageError:
    """Return the error for a cache folder that is not what its manifest says."""
    problem = f"cached data in {folder} do not match their manifest ({what})"
    return UsageError(f"{problem}; delete that folder and run again")


class ShardWriter:
    """A writer of the ids of one split into shards of at most `shard_tokens`; documents, each of
    which ends in `eos`, may cross shards."""

    def __init__(
        self, folder: Path, split: str, eos: int, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS
    ):
        self.folder, self.split, self.eos, self.dtype = folder, split, eos, dtype
        self.shard_tokens = shard_tokens
        self.tokens = self.documents = self.text_bytes = 0
        self._shards: list[dict[str, int | str]] = []
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._in_shard = self._ends_in_shard = 0

    def write(self, ids: np.ndarray, text_bytes: int, documents: int) -> None:
        """Append integer ids that stand for `text_bytes` of text and begin so many documents."""
        self.text_bytes += text_bytes
        self.documents += documents
        while len(ids):
            if self._file is None:
                path = self.folder / f"{self.split}-{len(self._shards):05d}.bin"
                self._file = path.open("wb", buffering=1 << 20)
            now, ids = np.split(ids, [self.shard_tokens - self._in_shard])
            content = now.astype(self.dtype).tobytes()
            self._ends_in_shard += int(np.count_nonzero(now == self.eos))
            self._file.write(content)
            self._hash.update(content)
            self.tokens += len(now)
            self._in_shard += len(now)
            if self._in_shard == self.shard_tokens:
                self._finish()

    def close(self) -> dict:
        """Sync the last shard and return the split's part of the manifest."""
        self._finish()
        totals = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes}
        return {**totals, "shards": self._shards}

    def _finish(self) -> None:
        if self._file is None:
            return
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        path = Path(self._file.name)
        self._shards.append(
            {
                "file": path.name,
                "tokens": self._in_shard,
                "documents": self._ends_in_shard,
                "bytes": path.stat().st_size,
                "sha256": self._hash.hexdigest(),
                "sample": sample_digest(path),
            }
        )
        self._file, self._hash = None, hashlib.sha256()
        self._in_shard = self._ends_in_shard = 0


class Tokens:
    """The ids of one split, mapped into memory over all of its shards; `len` is their number."""

    def __init__(
        self, folder: Path, split: dict, dtype: np.dtype, token_bytes_V: np.ndarray, verify: bool
    ):
        self.folder = folder
        self.vocab_size = len(token_bytes_V)
        self.bytes_V = token_bytes_V.astype(np.float64)
        """Bytes of text for which each id stands; on average, after `count_text`."""
        self.documents: int = split["documents"]
        self.text_bytes: int = split["text_bytes"]
        """Bytes of UTF-8 text that the ids stand for."""
        for shard in split["shards"]:
            check(folder, shard, dtype, verify)
        # Plain arrays over the maps: slicing a numpy.memmap is ten times slower.
        self.parts = [
            np.asarray(np.memmap(folder / shard["file"], dtype=dtype, mode="r"))
            for shard in split["shards"]
        ]
        self._starts = [0, *accumulate(len(part) for part in self.parts)]
        if len(self) != split["tokens"]:
            raise damaged(folder, f"{len(self):,} tokens, manifest {split['tokens']:,}")
        hashes = "".join(shard["sha256"] for shard in split["shards"])
        self.digest = hashlib.sha256(hashes.encode()).hexdigest()
        """A hash of all ids in their order."""

    def __len__(self) -> int:
        return self._starts[-1]

    def count_text(self, token_bytes: int, eos: int) -> None:
        """Make `bytes_V` add up to the bytes of the text, of which the ids show `token_bytes`."""
        if token_bytes:
            self.bytes_V *= self.text_bytes / token_bytes
        elif self.text_bytes:  # nothing but unknown tokens
            self.bytes_V[:] = self.text_bytes / (len(self) - self.documents)
            self.bytes_V[eos] = 0

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (int64 [n]) with the ids from `start` on; the first id follows the last. Raise
        UsageError for an id that is not in the vocabulary (a damaged shard)."""
        assert 0 <= start < len(self)
        number = bisect_right(self._starts, start) - 1
        inside, done = start - self._starts[number], 0
        while done < len(out):
            now = self.parts[number][inside : inside + len(out) - done]
            out[done : done + len(now)] = now
            done += len(now)
            number, inside = (number + 1) % len(self.parts), 0
        if out.max() >= self.vocab_size:
            raise damaged(self.folder, f"token id {out.max()}, vocabulary {self.vocab_size}")


def sample_digest(path: Path) -> str:
    """Return the sha256 of 256 blocks of 4 KiB, evenly spread from the first to the last byte."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in range(SAMPLE_BLOCKS):
            file.seek(max(size - SAMPLE_BYTES, 0) * block // (SAMPLE_BLOCKS - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check(folder: Path, shard: dict, dtype: np.dtype, verify: bool) -> None:
    """Raise UsageError if a file is not what its entry says; `tokens` counts its items."""
    path = folder / shard["file"]
    size = path.stat().st_size
    if size != shard["bytes"] or size != shard["tokens"] * dtype.itemsize:
        raise damaged(folder, f"{shard['file']} has {size:,} bytes, manifest {shard['bytes']:,}")
    if verify or size <= WHOLE_HASH_BYTES:
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]
    else:
        same = sample_digest(path) == shard["sample"]
    if not same:
        raise damaged(folder, f"{shard['file']} has another hash")
