"""What the documents of a source are: where each ends, a hash of it; and the bytes of its text.

Made from the finished shards of a source and kept beside them:

    CACHE/NAME-KEY/train-documents.bin    DOCUMENT, one per document, in their order
    CACHE/NAME-KEY/documents.json         the rest of DocumentIndex by split, what the splits share

Equal text has equal tokens, so the hash of a document is that of its ids."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from headway.data import near_copies
from headway.data.cache import synced
from headway.data.shard_file import Tokens, check, sample_digest
from headway.data.tokenizer import Tokenizer

DOCUMENT = np.dtype([("end", "<u8"), ("hash", "<u8")])
"""Of each document: the place after its eos, in tokens; blake2b of its ids, eos included."""
CHUNK_TOKENS = 1 << 22
"""Ids that are read at once."""


@dataclass(frozen=True)
class SplitIndex:
    """The documents of one split of a source."""

    file: str
    """Of DOCUMENT rows; with the next four as a shard's entry in the manifest."""
    tokens: int
    """Its rows."""
    bytes: int
    sha256: str
    sample: str
    token_bytes: int
    """Bytes of text that the ids show. They are not those of the text where the tokenizer
    normalises it, adds spaces or has no token for a part of it."""
    text: str
    """A hash of what the ids show, document by document: equal for equal text under any tokenizer
    that keeps all of it. Of validation; empty for training."""


@dataclass(frozen=True)
class DocumentIndex:
    """The documents of a source."""

    folder: Path
    train: SplitIndex
    val: SplitIndex
    shared: int
    """Validation documents of the source that are in its training too."""
    near_copied: float | None = None
    """The share of the validation text that has a near-copy in training (`near_copies.share`); None
    in folders of older versions."""

    @classmethod
    def load(cls, folder: Path, verify: bool) -> "DocumentIndex":
        """Read it from the cache. Raise UsageError if it is damaged; OSError, ValueError, KeyError
        or TypeError if it is incomplete."""
        entries = json.loads((folder / "documents.json").read_bytes())
        for split in ("train", "val"):
            check(folder, entries[split], DOCUMENT, verify)
        train, val = (SplitIndex(**entries[split]) for split in ("train", "val"))
        return cls(folder, train, val, entries["shared"], entries.get("near_copied"))

    def documents(self, split: SplitIndex) -> np.ndarray:
        """Return DOCUMENT `[documents]`, mapped into memory."""
        if not split.tokens:
            return np.empty(0, dtype=DOCUMENT)
        return np.asarray(np.memmap(self.folder / split.file, dtype=DOCUMENT, mode="r"))


def write_index(folder: Path, tokenizer: Tokenizer) -> None:
    """Index the shards of a folder whose manifest is written."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    entries, splits, shown = {}, dict[str, near_copies.Split](), 0
    for split in ("train", "val"):
        tokens = Tokens(folder, manifest["splits"][split], dtype, tokenizer.token_bytes, False)
        documents_N, token_bytes, text = _scan(tokens.parts, tokenizer, split == "val")
        splits[split] = near_copies.Split(tokens.parts, documents_N)
        shown += token_bytes
        path, content = folder / f"{split}-documents.bin", documents_N.tobytes()
        with synced(path) as file:
            file.write(content)
        digest = hashlib.sha256(content).hexdigest()
        values = (len(documents_N), len(content), digest, sample_digest(path), token_bytes, text)
        entries[split] = asdict(SplitIndex(path.name, *values))
    val, train = splits["val"], splits["train"]
    entries["shared"] = int(np.isin(val.documents_N["hash"], train.documents_N["hash"]).sum())
    entries["near_copied"] = near_copies.share(val, train, tokenizer.eos, shown)
    with synced(folder / "documents.json") as file:
        file.write(json.dumps(entries, indent=1).encode())


def _scan(
    parts: Sequence[np.ndarray], tokenizer: Tokenizer, show: bool
) -> tuple[np.ndarray, int, str]:
    """Return DOCUMENT rows, the bytes that the ids show, and with `show` their hash."""
    count_V = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    # An eos shows as a byte that no UTF-8 text holds, so that documents stay apart.
    shown_V = [*tokenizer.token_texts]
    shown_V[tokenizer.eos] = b"\xff"
    text, document = hashlib.sha256(), hashlib.blake2b(digest_size=8)
    ends: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    hashes = bytearray()
    position = 0
    for part in parts:
        for begin in range(0, len(part), CHUNK_TOKENS):
            chunk = part[begin : begin + CHUNK_TOKENS]
            count_V += np.bincount(chunk, minlength=len(count_V))
            if show:
                text.update(b"".join(map(shown_V.__getitem__, chunk.tolist())))
            stops = np.flatnonzero(chunk == tokenizer.eos) + 1
            content, last = memoryview(chunk.tobytes()), 0
            for stop in (stops * chunk.itemsize).tolist():
                document.update(content[last:stop])
                hashes += document.digest()
                document, last = hashlib.blake2b(digest_size=8), stop
            document.update(content[last:])
            ends.append(position + stops)
            position += len(chunk)
    documents_N = np.empty(len(hashes) // 8, dtype=DOCUMENT)
    documents_N["end"] = np.concatenate(ends)
    documents_N["hash"] = np.frombuffer(hashes, "<u8")
    token_bytes = int(count_V @ tokenizer.token_bytes)
    return documents_N, token_bytes, text.hexdigest() if show else ""
