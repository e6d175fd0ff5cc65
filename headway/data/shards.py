"""Sources → memory-mapped shards of token ids, tokenised once and kept in a cache.

Each source has its own folder, so that another mixture of the same sources costs nothing:

    CACHE/NAME-KEY/manifest.json      what is in it and from what, with a sha256 per shard
    CACHE/NAME-KEY/train-00000.bin    little-endian uint16 ids (uint32 above 65,536); eos after each document

KEY hashes the state of the source (path, size, modification time of each file), the tokenizer, val_fraction and the
format. A folder is written under a temporary name, synced and renamed, so it is whole or absent; processes that want
the same one wait for the first.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headway.config import DataConfig, UsageError
from headway.data import corpus
from headway.data.shard_file import ShardWriter, Tokens, damaged
from headway.data.tokenizer import Tokenizer

FORMAT = 1
"""Version of the folder's layout; another version is another key."""
BATCH_BYTES = 8 << 20
"""Text handed to the tokenizer at once; enough to keep all of its threads busy."""
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Source:
    """One tokenised source."""

    spec: str
    """As the user named it."""
    train: Tokens
    val: Tokens

    @property
    def folder(self) -> Path:
        """Where its shards lie."""
        return self.train.folder


@dataclass(frozen=True)
class Dataset:
    """The tokenised sources of a run."""

    sources: tuple[Source, ...]
    vocab_size: int
    """Of the tokenizer; every id is below it."""
    eos: int
    """The id that ends a document."""
    fingerprint: str
    """A hash of all tokens and their order: equal on every machine that has the same data, whatever its paths."""

    @property
    def train_tokens(self) -> int:
        """Over all sources, eos included."""
        return sum(len(source.train) for source in self.sources)

    @property
    def val_tokens(self) -> int:
        """Over all sources, eos included."""
        return sum(len(source.val) for source in self.sources)


def validate(config: DataConfig) -> None:
    """UsageError for values of `config` that no data could satisfy."""
    if not config.source:
        raise UsageError(
            "data.source is empty; give stdlib, a file, a folder, a glob or hf:NAME[:SPLIT]"
        )
    if not 0 < config.val_fraction < 1:
        raise UsageError(
            f"val_fraction {config.val_fraction} must lie between 0 and 1, both excluded; try 0.05"
        )
    if config.seq_len < 1 or config.batch_size < 1:
        raise UsageError(
            f"seq_len {config.seq_len} and batch_size {config.batch_size} must be 1 or more"
        )
    if config.weights and len(config.weights) != len(config.source):
        raise UsageError(
            f"{len(config.weights)} weights for {len(config.source)} sources; give one weight per source, or none"
        )
    for spec, weight in zip(config.source, config.weights, strict=False):
        if not 0 < weight < float("inf"):  # also false for NaN
            raise UsageError(f"weight {weight} of source {spec!r} must be a finite number above 0")


def cache_root(config: DataConfig) -> Path:
    """The cache folder of a config: its `cache_dir`, else $HEADWAY_CACHE, else ~/.cache/headway."""
    named = config.cache_dir or os.environ.get("HEADWAY_CACHE", "")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "headway"


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    log: Callable[[str], None] = print,
    verify: bool = False,
) -> Dataset:
    """Tokenise each source, or find it in the cache, and map its shards into memory.

    A cached folder is trusted after a check of its sizes and hashes: shards up to 16 MiB are hashed whole, larger ones
    in 256 evenly spread blocks, which finds truncated, exchanged and zeroed files at once; a single flipped bit needs
    `verify=True`, which hashes everything (about 1 s per GB). `log` gets a line every few seconds of long work.
    UsageError for data that cannot be read and for a cache that is damaged or cannot be written.
    """
    validate(config)
    root = cache_root(config)
    sources = tuple(_source(spec, config, tokenizer, root, log, verify) for spec in config.source)
    content = [tokenizer.fingerprint, *([s.train.digest, s.val.digest] for s in sources)]
    return Dataset(sources, tokenizer.vocab_size, tokenizer.eos, _hash(content))


def _source(
    spec: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    root: Path,
    log: Callable[[str], None],
    verify: bool,
) -> Source:
    _check_apart(spec, root)
    key = _hash([FORMAT, corpus.identity(spec), tokenizer.fingerprint, config.val_fraction])
    name = re.sub(r"[^A-Za-z0-9.]+", "-", Path(spec).name or spec).strip("-.")[:32]
    folder = root / f"{name or 'data'}-{key[:20]}"
    if not folder.is_dir():
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{folder.name}.lock", log) as alone:
            if (
                alone
            ):  # nobody else is at work, so what is left here was left by a process that died
                for stale in root.glob(f".{folder.name}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)
            if not folder.is_dir():
                _build(spec, config, tokenizer, folder, log)
    return _load(spec, folder, tokenizer, verify)


def _build(
    spec: str, config: DataConfig, tokenizer: Tokenizer, folder: Path, log: Callable[[str], None]
) -> None:
    """Tokenise `spec` into a temporary folder, then give it its name."""
    root = folder.parent
    with _writing(root):
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=root))
    try:
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        writers = {part: ShardWriter(temporary, part, dtype) for part in ("train", "val")}
        eos = np.array([tokenizer.eos])
        began = reported = time.monotonic()
        for group in _groups(spec, config.val_fraction):
            encoded = tokenizer.encode_batch([text for _, text, _ in group])
            with _writing(root):
                for (part, text, last), ids in zip(group, encoded, strict=True):
                    size = len(text) if text.isascii() else len(text.encode())
                    writers[part].write(ids, size)
                    if last:
                        writers[part].end_document(eos)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                log(f"tokenising {spec}: {_progress(writers, reported - began)}")
        if not any(writer.documents for writer in writers.values()):
            raise UsageError(
                f"data source {spec!r} holds no text; give a file, folder or glob with some"
            )
        with _writing(root):
            splits = {part: writer.close() for part, writer in writers.items()}
            manifest = {
                "format": FORMAT,
                "source": spec,
                "tokenizer": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "val_fraction": config.val_fraction,
                "dtype": dtype.name,
                "splits": splits,
            }
            with (temporary / "manifest.json").open("w") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(
                temporary, 0o777 & ~_umask()
            )  # mkdtemp makes it private; the cache may be shared
            _sync(temporary)
            try:
                temporary.rename(folder)
            except OSError as error:
                # Without locks (some network file systems) another process may have been first: its folder is as good.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _sync(root)
        log(f"tokenised {spec}: {_progress(writers, time.monotonic() - began)}; kept in {folder}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _groups(spec: str, val_fraction: float) -> Iterator[list[tuple[corpus.Split, str, bool]]]:
    """Lists of (split, piece of text, does its document end here), of about BATCH_BYTES characters each."""
    group: list[tuple[corpus.Split, str, bool]] = []
    size = 0
    for part, document in corpus.split(corpus.documents(spec), val_fraction):
        pieces = document.pieces()
        piece = next(pieces, None)
        while piece is not None:
            following = next(pieces, None)
            group.append((part, piece, following is None))
            size += len(piece)
            piece = following
            if size >= BATCH_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group


def _load(spec: str, folder: Path, tokenizer: Tokenizer, verify: bool) -> Source:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        parts = {part: manifest["splits"][part] for part in ("train", "val")}
        if (
            manifest["tokenizer"] != tokenizer.fingerprint
            or manifest["vocab_size"] != tokenizer.vocab_size
        ):
            raise damaged(folder, "its manifest names another tokenizer")
        train, val = (
            Tokens(folder, parts[part], dtype, tokenizer.vocab_size, verify)
            for part in ("train", "val")
        )
    except UsageError:
        raise
    except PermissionError as error:
        raise UsageError(f"cannot read the cache {folder}: {error.strerror}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from None
    return Source(spec, train, val)


def _check_apart(spec: str, root: Path) -> None:
    """The cache must not lie where it would be read as data."""
    folder = Path(spec).expanduser()
    if spec == "stdlib" or spec.startswith("hf:") or not folder.is_dir():
        return
    data, cache = folder.resolve(), root.resolve()
    if cache.is_relative_to(data) and not any(
        part[0] == "." for part in cache.relative_to(data).parts
    ):
        raise UsageError(
            f"cache folder {root} lies inside data source {spec!r}; set data.cache_dir elsewhere"
        )


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """An error of the file system while writing the cache becomes one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some, or set data.cache_dir to another disk"
            raise UsageError(f"no space left for the tokenised data in {root}; {fix}") from error
        reason = error.strerror or str(error)
        raise UsageError(
            f"cannot write the cache {root}: {reason}; set data.cache_dir to a folder you may write"
        ) from error


@contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock file, which the system releases when a process dies. False where the file system has no locks."""
    with _writing(path.parent):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that tokenises the same data ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _progress(writers: dict[str, ShardWriter], seconds: float) -> str:
    train, val = writers["train"], writers["val"]
    megabytes = (train.text_bytes + val.text_bytes) / 1e6
    return (
        f"{megabytes:,.1f} MB, {train.documents + val.documents:,} documents, {train.tokens:,} + {val.tokens:,} tokens "
        f"(train + validation), {megabytes / max(seconds, 1e-9):,.1f} MB/s"
    )


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
