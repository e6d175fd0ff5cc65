"""Source → folder of shards: the units are tokenised by several processes, then joined by one."""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headway.config import DataConfig
from headway.data import cache, near_duplicates, parts, workers
from headway.data.document import validation_numbers
from headway.data.document_index import write_index
from headway.data.files import BadData
from headway.data.parts import Job
from headway.data.shard_file import ShardWriter, damaged
from headway.data.tokenizer import Tokenizer
from headway.data.units import plan

FORMAT = 5
"""Version of the folder's layout; another version is another key."""
PROGRESS_SECONDS = 5.0
RUN_TOKENS = 1 << 22
"""Ids that are copied at once."""


def tokenise(
    spec: str, config: DataConfig, tokenizer: Tokenizer, folder: Path, log: cache.Log
) -> None:
    """Make the folder of a source, together with all processes that want it and from what killed
    ones have done. Raise UsageError for unreadable data and for a cache that cannot be written."""
    units, made_of = plan(spec, config.val_fraction)
    parts_folder = folder.parent / f".{folder.name}.parts"
    clusters = config.near_duplicates == "cluster"
    if clusters:
        near_duplicates.check_installed()
    job = Job(units, tokenizer, config.skip_bad, clusters, parts_folder, folder)
    n = workers.count(config.workers, job)
    progress = _Progress(spec, job, n, log)

    def join(into: Path) -> None:
        near = _clusters(job, config.val_fraction) if clusters else None
        splits, skipped, bad = _join(job, config.val_fraction, near, into, progress.joining)
        if not sum(split["documents"] for split in splits.values()):
            unread = f", and {skipped:,} that cannot be read ({bad[0]})" if bad else ""
            fix = "give a file, folder or glob with some"
            raise BadData(f"data source {spec!r} holds no text{unread}; {fix}")
        manifest = {
            "format": FORMAT,
            "source": spec,
            "made_of": made_of,
            "skipped": skipped,
            "bad": bad,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "val_fraction": config.val_fraction,
            "dtype": job.dtype.name,
            "splits": splits,
            "near_duplicates": near and near.said,
        }
        with cache.writing(folder.parent):
            with cache.synced(into / "manifest.json") as file:
                file.write(json.dumps(manifest, indent=1).encode())
            write_index(into, tokenizer)
        progress.end()

    try:
        workers.run(job, n, progress.add, progress.show)
        cache.make(folder, join, log)
    except BadData:  # once it is mended the source has another key
        shutil.rmtree(parts_folder, ignore_errors=True)
        raise
    except FileNotFoundError:  # others, whom no lock held back, were faster and removed the parts
        if not folder.is_dir():
            raise
    shutil.rmtree(parts_folder, ignore_errors=True)


class _Progress:
    """Logs a line every few seconds."""

    def __init__(self, spec: str, job: Job, n: int, log: cache.Log):
        self.spec, self.job, self.log = spec, job, log
        self.by = f"{n} process{'es' * (n > 1)}"
        self.total = sum(unit.bytes for unit in job.units)
        self.began = self.shown = time.monotonic()
        self.before = self._done()
        self.bytes = 0
        if self.before:
            log(f"tokenising {spec}: going on at {self.before / self.total:.0%}")

    def add(self, size: int) -> None:
        """Count bytes of text that this machine has tokenised."""
        self.bytes += size

    def show(self) -> None:
        """Log a line if it is time for one."""
        if not self._due():
            return
        line = f"tokenising {self.spec}: {self._speed()}"
        done = self._done()
        if self.total and done:
            line += f", {done / self.total:.0%} of the source"
        if done > self.before:
            left = (time.monotonic() - self.began) * (self.total - done) / (done - self.before)
            line += f", {left:,.0f} s left"
        self.log(line)

    def joining(self, unit: int) -> None:
        """Log, if it is time for a line, that the parts before `unit` have been joined."""
        if self._due():
            self.log(f"joining {self.spec}: {unit:,} of {len(self.job.units):,} parts")

    def end(self) -> None:
        """Log the last line."""
        self.log(f"tokenised {self.spec}: {self._speed()}; kept in {self.job.target.parent}")

    def _due(self) -> bool:
        """Return whether it is time for a line, at most once every few seconds."""
        now = time.monotonic()
        due = now - self.shown > PROGRESS_SECONDS
        self.shown = now if due else self.shown
        return due

    def _speed(self) -> str:
        megabytes = self.bytes / 1e6
        speed = megabytes / max(time.monotonic() - self.began, 1e-9)
        return f"{megabytes:,.1f} MB, {speed:,.1f} MB/s by {self.by}"

    def _done(self) -> int:
        """Return the bytes of the units that are done, by any process."""
        units = enumerate(self.job.units)
        return sum(unit.bytes for number, unit in units if self.job.is_done(number))


class _Near(NamedTuple):
    leader_N: np.ndarray
    """Of each document, in whose split it is: the first of its cluster."""
    said: str
    """One line for people."""


def _clusters(job: Job, val_fraction: float) -> _Near:
    """Return the clusters of near-duplicates of a source."""
    minima: list[np.ndarray] = []
    sizes: list[int] = []
    for part, doc_P in _numbered(job):
        for document, minima_M, row in zip(doc_P, part.minima_PM, part.index, strict=True):
            if document == len(minima):
                minima.append(minima_M)
                sizes.append(0)
            minima[document] = np.minimum(minima[document], minima_M)
            sizes[document] += int(row["bytes"])
    near = near_duplicates.clusters(np.array(minima).reshape(-1, near_duplicates.MINIMA))
    numbers = itertools.takewhile(lambda n: n < len(minima), validation_numbers(val_fraction))
    bytes_N, is_val_N = np.array(sizes), np.zeros(len(minima), dtype=bool)
    is_val_N[list(numbers)] = True
    share = near.copied_bytes(bytes_N, is_val_N) / max(int(bytes_N[is_val_N].sum()), 1)
    said = (
        f"near-duplicates: {near.documents:,} documents in {near.clusters:,} clusters, each in one "
        f"split (apart, {share:.1%} of the bytes of validation would have a near-copy in training)"
    )
    return _Near(near.leader_N, said)


def _join(
    job: Job, val_fraction: float, near: _Near | None, into: Path, tell: Callable[[int], None]
) -> tuple[dict[str, dict], int, list[str]]:
    """Write the shards, from the parts. Their entries of the manifest by split, the number of
    documents that could not be read and lines about the first of them. Documents are numbered in
    the order of the source, and the number says which are validation."""
    skipped = [doc_P[part.index["bad"]] for part, doc_P in _numbered(job)]
    skipped = np.unique(np.concatenate([np.empty(0, np.int64), *skipped]))
    numbers = validation_numbers(val_fraction)
    chosen = [next(numbers)]
    writers = [ShardWriter(into, split, job.tokenizer.eos, job.dtype) for split in ("train", "val")]
    bad: list[str] = []
    files: set[str] = set()  # whole files, which each of their units names
    n_skipped = len(skipped)
    for number, (part, doc_P) in enumerate(_numbered(job)):
        tell(number)
        bad += [why for why in part.bad if why not in bad]
        files |= set(part.files)
        n_skipped += part.unread
        while len(doc_P) and chosen[-1] <= doc_P[-1]:
            chosen.append(next(numbers))
        split_P = np.isin(doc_P if near is None else near.leader_N[doc_P], chosen).astype(np.int64)
        split_P[np.isin(doc_P, skipped)] = -1
        if near is None:
            chosen = chosen[-2:]  # the last document may go on in the next part
        end_P = np.cumsum(part.index["tokens"])
        changes_P = np.diff(split_P, prepend=-2) != 0
        changes_P |= np.diff(end_P // RUN_TOKENS, prepend=-1) != 0
        edges = [*np.flatnonzero(changes_P), len(doc_P)]
        with part.path.open("rb") as file:
            for first, last in itertools.pairwise(edges):
                rows = part.index[first:last]
                size = int(rows["tokens"].sum()) * job.dtype.itemsize
                content = file.read(size)
                if len(content) != size:
                    raise damaged(job.folder, f"{part.path.name} has another size")
                if split_P[first] >= 0:
                    ids = np.frombuffer(content, job.dtype)
                    documents, text_bytes = rows["begins"].sum(), rows["bytes"].sum()
                    with cache.writing(into.parent):
                        writers[split_P[first]].write(ids, int(text_bytes), int(documents))
    with cache.writing(into.parent):
        train, val = (writer.close() for writer in writers)
    return {"train": train, "val": val}, n_skipped + len(files), bad[: parts.NAMED]


def _numbered(job: Job) -> Iterator[tuple[parts.Part, np.ndarray]]:
    """Yield each part, and the number of the document of each of its pieces."""
    last = -1
    for unit in range(len(job.units)):
        part = parts.load(job, unit)
        doc_P = last + np.cumsum(part.index["begins"])
        yield part, doc_P
        last = doc_P[-1] if len(doc_P) else last
