"""The tokens of a source, unit by unit, made by any number of processes on any number of machines.

    CACHE/.NAME-KEY.parts/00012.bin    the ids of unit 12, eos after each document
    CACHE/.NAME-KEY.parts/00012.npz    its index: a row per piece of text; written last

A unit is done when its index is there. Both files are written under another name, synced and
renamed, and every process would write the same bytes: a unit that two of them tokenise costs time
and nothing else. So the locks, by which they share the units, need not be reliable, and whatever
was killed is taken over by who comes next."""

import fcntl
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headway.data import cache, near_duplicates
from headway.data.document import Bad, TextPiece
from headway.data.tokenizer import Tokenizer
from headway.data.units import Unit, read

BATCH_CHARS = 1 << 20
"""Text that is handed to the tokenizer at once."""
NAMED = 5
"""Documents that could not be read and are named."""
POLL_SECONDS = 0.2

INDEX = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("begins", "?"), ("bad", "?")])
"""Of each piece of text: its tokens, eos included; its bytes of UTF-8; whether its document begins
with it; whether its document cannot be read."""

Tell = Callable[[int], None]
"""Gets the bytes of text that were tokenised since the last call."""


@dataclass(frozen=True)
class Job:
    """How a source is tokenised: all that a worker process needs to know."""

    units: list[Unit]
    tokenizer: Tokenizer
    skip_bad: bool
    clusters: bool
    """Whether near-duplicates are looked for."""
    folder: Path
    """Of the parts."""
    target: Path
    """Of the finished shards: once it is there, nothing is left to do."""

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the ids on disk."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    def is_done(self, unit: int) -> bool:
        """Return whether the part of a unit is there."""
        return (self.folder / f"{unit:05d}.npz").is_file()


@dataclass(frozen=True)
class Part:
    """The tokenised documents of a unit."""

    path: Path
    """The file of ids."""
    index: np.ndarray
    """INDEX, one per piece."""
    bad: list[str]
    """The first documents that could not be read, a line each."""
    files: list[str]
    """Files of rows that could not be read to their end; every unit of a file names it."""
    unread: int
    """How many rows could not be read; texts are in the index."""
    minima_PM: np.ndarray
    """`near_duplicates.minima` of each piece; without rows unless they are looked for."""


def work(job: Job, tell: Tell) -> None:
    """Tokenise the units that no other process has claimed, until all are done. Several processes
    may do that at once. Raise UsageError for data that cannot be read and for a full disk."""
    with cache.writing(job.target.parent):
        job.folder.mkdir(parents=True, exist_ok=True)
    # Where locks do not reach other machines these at least begin in different places.
    first = zlib.crc32(socket.gethostname().encode()) % max(len(job.units), 1)
    left = [*range(first, len(job.units)), *range(first)]
    while left and not job.target.is_dir():
        count = len(left)
        with cache.writing(job.target.parent):
            left = [unit for unit in left if not (job.is_done(unit) or _try(job, unit, tell))]
        if len(left) == count:
            tell(0)
            time.sleep(POLL_SECONDS)


def load(job: Job, unit: int) -> Part:
    """Read the part of a unit. Raise FileNotFoundError if it is not there."""
    path = job.folder / f"{unit:05d}.npz"
    with np.load(path) as arrays:
        lines = arrays["bad"].tolist(), arrays["files"].tolist()
        unread, minima_PM = int(arrays["unread"]), arrays["minima"]
        return Part(path.with_suffix(".bin"), arrays["index"], *lines, unread, minima_PM)


def _try(job: Job, unit: int, tell: Tell) -> bool:
    """Tokenise a unit unless another process has claimed it; return whether it is done."""
    try:
        with _claimed(job.folder / f"{unit:05d}.lock") as mine:
            if mine and not job.is_done(unit):
                _tokenise(job, unit, tell)
            return mine
    except FileNotFoundError:
        # Others made the shards meanwhile and removed the parts, or gave up and removed them.
        if not job.target.is_dir():
            job.folder.mkdir(parents=True, exist_ok=True)
        return False


def _tokenise(job: Job, number: int, tell: Tell) -> None:
    unit, tokenizer = job.units[number], job.tokenizer
    path = job.folder / f"{number:05d}.bin"
    mark = f".{socket.gethostname()}-{os.getpid()}"  # another process may write the same unit
    rows, bad, unread, files, minima_P = [], [], 0, set(), []
    with cache.synced(path.with_suffix(mark)) as file:
        for batch in _batches(read(unit, job.skip_bad)):
            told = 0
            texts = [one.text if isinstance(one, TextPiece) else "" for one in batch]
            for one, text, ids in zip(batch, texts, tokenizer.encode_batch(texts), strict=True):
                # Here every document passes, in pieces: its text and its ids.
                if isinstance(one, Bad):
                    bad.append(one.why)
                    if one.numbered:
                        rows.append((0, 0, one.begins, True))
                        minima_P.append(near_duplicates.NONE)
                    elif one.file:
                        files.add(one.why)
                    else:
                        unread += 1
                    continue
                if one.ends:
                    ids = np.append(ids, tokenizer.eos)
                size = len(text) if text.isascii() else len(text.encode())
                file.write(ids.astype(job.dtype).tobytes())
                rows.append((len(ids), size, one.begins, False))
                if job.clusters:
                    minima_P.append(near_duplicates.minima(text))
                told += size
            tell(told)
    index = np.array(rows, dtype=INDEX)
    named = np.array(list(dict.fromkeys(bad))[:NAMED], dtype=str)
    whole = np.array(sorted(files), dtype=str)
    with cache.synced(path.with_suffix(mark + ".npz")) as file:
        minima = np.array(minima_P if job.clusters else [], dtype=np.uint64)
        np.savez(file, index=index, unread=unread, bad=named, files=whole, minima=minima)
    path.with_suffix(mark).rename(path)
    path.with_suffix(mark + ".npz").rename(path.with_suffix(".npz"))


def _batches(pieces: Iterator[TextPiece | Bad]) -> Iterator[list[TextPiece | Bad]]:
    """Yield lists of pieces of about BATCH_CHARS each."""
    batch, size = [], 0
    for one in pieces:
        batch.append(one)
        size += len(one.text) if isinstance(one, TextPiece) else 0
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Yield whether no other process holds the lock file; True where there are no locks."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
