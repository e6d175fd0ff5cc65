"""Sources → memory-mapped shards of token ids, tokenised once and kept in a cache.

Each source has its own folder, so that another mixture of the same sources costs nothing:

    CACHE/NAME-KEY/manifest.json      what is in it and from what, with a sha256 per shard
    CACHE/NAME-KEY/train-00000.bin    little-endian uint16 ids (uint32 above 65,536 of them),
                                      eos after each document
    CACHE/NAME-KEY/documents.json     what the documents are, see document_index.py

KEY hashes the state of the source (path, size, modification time and a hash of each file), the
tokenizer, val_fraction, skip_bad, near_duplicates and the format."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from headway.config import DataConfig, UsageError
from headway.data import cache, corpus
from headway.data.cache import Log
from headway.data.document_index import DocumentIndex
from headway.data.overlap import Kept, Overlap, count, kept_documents
from headway.data.shard_file import Tokens, damaged
from headway.data.tokenise import FORMAT, tokenise
from headway.data.tokenizer import Tokenizer
from headway.data.worlds.source import VAL_ITEMS, WorldSource


@dataclass(frozen=True)
class Source:
    """One tokenised text."""

    spec: str
    """As the user named it."""
    folder: Path
    """Where its shards lie."""
    train: Tokens | Kept
    val: Tokens
    index: DocumentIndex
    approximate: str
    """Why its bits per byte are approximate; empty where the ids show each byte of the text."""

    @property
    def train_tokens(self) -> int:
        """Return the number of tokens, eos included."""
        return len(self.train)

    @property
    def val_tokens(self) -> int:
        """Return the number of tokens, eos included."""
        return len(self.val)

    @property
    def digests(self) -> list[str]:
        """Return hashes of all tokens of training and of validation."""
        return [self.train.digest, self.val.digest]

    @property
    def val_text(self) -> str:
        """Return a hash of the text of validation (`SplitIndex.text`)."""
        return self.index.val.text


@dataclass(frozen=True)
class Dataset:
    """The sources of a run: tokenised texts, and worlds."""

    sources: tuple[Source | WorldSource, ...]
    vocab_size: int
    """Of the tokenizer; every id is below it."""
    eos: int
    """The id that ends a document."""
    fingerprint: str
    """A hash of all tokens in their order: equal for equal data, whatever their paths."""
    overlap: Overlap
    """What training and validation share."""

    @property
    def approximate(self) -> tuple[str, ...]:
        """Return why bits per byte are approximate, for each source where they are."""
        return tuple(source.approximate for source in self.sources if source.approximate)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a reader of numbers measured on these data has to know, one line each."""
        said, fix = self.overlap.sentence, "--data.dedup exact leaves them out of training"
        if self.overlap.shared:
            return (f"{said}; {fix}", *self.approximate)
        return (said, *self.approximate) if self.overlap.removed else self.approximate

    @property
    def train_tokens(self) -> int:
        """Return the number of tokens over all sources, eos included."""
        return sum(source.train_tokens for source in self.sources)

    @property
    def val_tokens(self) -> int:
        """Return the number of tokens over all sources, eos included."""
        return sum(source.val_tokens for source in self.sources)


def prepare(
    config: DataConfig, tokenizer: Tokenizer, log: Log = print, verify: bool = False
) -> Dataset:
    """Tokenise each text, or find it in the cache, and map its shards into memory; open worlds.

    A cached folder is checked by the sizes and hashes in its manifest. Shards up to 16 MiB are
    hashed whole, larger ones in 256 evenly spread blocks, which finds files that were cut off,
    exchanged or zeroed but may miss a single wrong bit; `verify=True` hashes everything (about 1 s
    per GB). `log` gets a line every few seconds of long work. Safe to call from many processes at
    once, on one machine or on several that share the cache: they share the work too. UsageError
    for data that cannot be read, and for a cache that is damaged or cannot be written."""
    config.check()
    root = cache.root_of(config)
    if config.worlds:
        worlds = tuple(WorldSource.open(spec, tokenizer) for spec in config.source)
        return _dataset(worlds, tokenizer, Overlap(VAL_ITEMS * len(worlds), 0))
    sources = tuple(_source(spec, config, tokenizer, root, log, verify) for spec in config.source)
    indices = [source.index for source in sources]
    if config.dedup == "exact":
        kept_by_source, overlap = kept_documents(indices)
        sources = tuple(map(_without_repeats, sources, kept_by_source))
    else:
        overlap = count(indices)
    return _dataset(sources, tokenizer, overlap)


def _dataset(
    sources: tuple[Source, ...] | tuple[WorldSource, ...], tokenizer: Tokenizer, overlap: Overlap
) -> Dataset:
    content = [tokenizer.fingerprint, *(source.digests for source in sources)]
    return Dataset(sources, tokenizer.vocab_size, tokenizer.eos, _hash(content), overlap)


def _without_repeats(source: Source, kept_N: np.ndarray) -> Source:
    if kept_N.all():
        return source
    assert isinstance(source.train, Tokens)
    rows_N = source.index.documents(source.index.train)
    return replace(source, train=Kept(source.train, rows_N, kept_N))


def _source(
    spec: str, config: DataConfig, tokenizer: Tokenizer, root: Path, log: Log, verify: bool
) -> Source:
    _check_apart(spec, root)
    state = [FORMAT, corpus.identity(spec), tokenizer.fingerprint, config.val_fraction]
    state += ["skip_bad"] if config.skip_bad else []
    state += ["cluster"] if config.near_duplicates == "cluster" else []
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(spec).name).strip("-")[:32] or "data"
    folder = root / f"{name}-{_hash(state)[:20]}"
    if not folder.is_dir():
        tokenise(spec, config, tokenizer, folder, log)
    return _load(spec, folder, tokenizer, verify, log)


def _load(spec: str, folder: Path, tokenizer: Tokenizer, verify: bool, log: Log) -> Source:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        wanted = {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        if any(manifest[name] != value for name, value in wanted.items()):
            raise damaged(folder, "its manifest names another tokenizer")
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        train, val = (
            Tokens(folder, manifest["splits"][part], dtype, tokenizer.token_bytes, verify)
            for part in ("train", "val")
        )
        index = DocumentIndex.load(folder, verify)
        shown = index.train.token_bytes, index.val.token_bytes
        train.count_text(shown[0], tokenizer.eos)
        val.count_text(shown[1], tokenizer.eos)
        log(f"data {spec}: {_summary(manifest, train, val, index)}")
        for line in manifest["bad"]:
            log(f"skipped: {line}")
    except UsageError:
        raise
    except PermissionError as error:
        raise UsageError(f"cannot read the cache {folder}: {error.strerror}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from None
    has, approximate = (train.text_bytes, val.text_bytes), ""
    if shown != has:
        approximate = (
            f"bits/byte are approximate: the tokenizer changes the text of {spec}, {sum(has):,} "
            f"bytes of text are {sum(shown):,} in its tokens; they are divided by those of the "
            "text, in which each token has its share"
        )
    return Source(spec, folder, train, val, index, approximate)


def _summary(manifest: dict, train: Tokens, val: Tokens, index: DocumentIndex) -> str:
    """Return one line: what a source is made of, what it gave and what was left out."""
    megabytes = (train.text_bytes + val.text_bytes) / 1e6
    said = (
        f"{manifest['made_of']}; {megabytes:,.1f} MB of text; documents: {train.documents:,} for "
        f"training, {val.documents:,} for validation; tokens: {len(train):,} and {len(val):,}"
    )
    if index.near_copied is not None:
        said += f"; {index.near_copied:.1%} of the validation text has a near-copy in training"
    if manifest.get("near_duplicates"):  # absent in older folders
        said += f"; {manifest['near_duplicates']}"
    elif index.near_copied:
        said += " (--data.near-duplicates cluster puts near-copies into one split)"
    skipped = manifest["skipped"]
    return f"{said}; skipped, as they cannot be read: {skipped:,}" if skipped else said


def _check_apart(spec: str, root: Path) -> None:
    """Raise UsageError if the cache would be read as data."""
    folder = Path(spec).expanduser()
    if spec == "stdlib" or spec.startswith(("hf:", "set:")) or not folder.is_dir():
        return
    data, inside = folder.resolve(), root.resolve()
    if not inside.is_relative_to(data):
        return
    if not any(part.startswith(".") for part in inside.relative_to(data).parts):  # hidden: not read
        problem = f"cache {root} lies inside data source {spec!r}"
        raise UsageError(f"{problem}; set data.cache_dir elsewhere")


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
