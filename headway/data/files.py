"""The files of a source: which ones are read, which are not and why, and how they are opened."""

import bz2
import gzip
import hashlib
import importlib
import io
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from types import ModuleType
from typing import BinaryIO, NamedTuple, cast

from headway.config import UsageError

SAMPLED_BYTES, BLOCK_BYTES = 64 << 20, 4096
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes after which another one names the kind of text."""


class BadData(UsageError):
    """A document or a file that cannot be read; `data.skip_bad` leaves it out."""


class File(NamedTuple):
    """A file and its state when it was found."""

    path: Path
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""


@dataclass
class Found:
    """The files of a source, in their order, and how many of what else were there."""

    files: list[File] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def walk(folder: Path) -> Found:
    """Return all files below a folder, sorted, but for hidden ones and `__pycache__`. Symbolic
    links to folders are followed: each folder is read once, under its own name if it is below
    `folder`, and a link to an enclosing one is left out. UsageError for unreadable ones."""
    paths: list[Path] = []
    left_out: Counter[str] = Counter()
    seen, todo = set(), [folder]
    while todo:
        for here, folders, names in os.walk(todo.pop(0), onerror=_unreadable):
            stat = os.stat(here)
            if (stat.st_dev, stat.st_ino) in seen:
                folders.clear()
                left_out["links to folders that are read already"] += 1
                continue
            seen.add((stat.st_dev, stat.st_ino))
            folders.sort()
            searched = [name for name in folders if name[0] != "." and name != "__pycache__"]
            left_out["hidden folders"] += sum(name[0] == "." for name in folders)
            folders[:] = searched
            for name in searched:
                path = os.path.join(here, name)
                if not os.path.islink(path):
                    continue
                around = os.path.join(os.path.realpath(here), "")
                if around.startswith(os.path.join(os.path.realpath(path), "")):
                    left_out["links to a folder around them"] += 1
                else:
                    todo.append(Path(path))  # after all folders that need no link
            left_out["hidden files"] += sum(name[0] == "." for name in names)
            paths += [Path(here, name) for name in names if name[0] != "."]
    return Found(ordinary(sorted(paths), left_out), left_out)


def once(files: list[File], left_out: Counter[str]) -> list[File]:
    """Return `files`, sorted; of the names that links give to one file, the shortest is kept."""
    by_target: dict[str, File] = {}
    for file in sorted(set(files), key=lambda file: (len(file.path.parts), file.path)):
        by_target.setdefault(os.path.realpath(file.path), file)
    left_out["links to files that are read already"] += len(set(files)) - len(by_target)
    return sorted(by_target.values())


def ordinary(paths: Sequence[Path], left_out: Counter[str]) -> list[File]:
    """Return the ordinary files among `paths`, in order. Raise UsageError for an unreadable one."""
    files = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            if not path.is_symlink():
                raise UsageError(f"cannot read {path}: {error.strerror}") from None
            left_out["broken links"] += 1
            continue
        if S_ISREG(stat.st_mode):
            files.append(File(path, stat.st_size, stat.st_mtime_ns))
        else:
            left_out["pipes, sockets and devices"] += 1
    return files


def kind_of(path: Path) -> str:
    """Return the suffix that says how a file is read, beside that of packing, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def compressed(path: Path) -> bool:
    """Return whether `open_file` unpacks it."""
    return path.suffix.lower() in COMPRESSED


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open for reading; .gz, .bz2, .xz and .zst (extra `[data]`) are unpacked. Errors of the file
    system, of unpacking and of memory become BadData, also those while it is open."""
    try:
        with _open(path) as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise BadData(f"cannot read {path}: {reason}") from None
    except MemoryError:
        raise BadData(f"cannot read {path}: there is not enough memory for it") from None


def _open(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path))
        case ".bz2":
            return cast(BinaryIO, bz2.open(path))
        case ".xz":
            return cast(BinaryIO, lzma.open(path))
        case ".zst":
            packed = extra("pyarrow", str(path)).input_stream(str(path), compression="zstd")
            return cast(BinaryIO, io.BufferedReader(packed))
        case _:
            return path.open("rb")


def forward(file: BinaryIO, position: int) -> None:
    """Go to a position of a file that was just opened, by reading up to it where need be."""
    if file.seekable():
        file.seek(position)
        return
    while position and (block := file.read(min(position, 1 << 20))):
        position -= len(block)


def sampled_hashes(files: Sequence[File]) -> list[str]:
    """Return a hash of each file: of all its bytes while the source has at most SAMPLED_BYTES, else
    of evenly spread blocks, in proportion to its size and at least three."""
    share = min(SAMPLED_BYTES / max(sum(file.size for file in files), 1), 1.0)

    def digest(file: File) -> str:
        digest = hashlib.blake2b(digest_size=12)
        blocks = max(int(file.size * share) // BLOCK_BYTES, 3)
        try:
            with file.path.open("rb", buffering=0) as content:
                if share == 1.0 or file.size <= blocks * BLOCK_BYTES:
                    while part := content.read(1 << 20):
                        digest.update(part)
                else:
                    for block in range(blocks):
                        content.seek((file.size - BLOCK_BYTES) * block // (blocks - 1))
                        digest.update(content.read(BLOCK_BYTES))
        except OSError as error:
            return f"unreadable: {error.strerror}"  # said when it is read
        return digest.hexdigest()

    def digests(files: Sequence[File]) -> list[str]:
        return [digest(file) for file in files]

    some = [files[at : at + 256] for at in range(0, len(files), 256)]
    with ThreadPoolExecutor(8) as threads:  # a network's file system answers several at once
        return [digest for part in threads.map(digests, some) for digest in part]


def counted(things: Counter[str]) -> str:
    """Return text such as `empty files (2), hidden folders (3)`; empty when there are none."""
    return ", ".join(f"{what} ({n:,})" for what, n in sorted(things.items()) if n)


def first_line(error: Exception) -> str:
    """Return what an error of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def extra(module: str, wanted_by: str) -> ModuleType:
    """Import a module of the extra `[data]`. Raise UsageError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UsageError(f"{wanted_by} needs {package}: pip install 'headway[data]'") from None


def _unreadable(error: OSError) -> None:
    raise UsageError(f"cannot read folder {error.filename}: {error.strerror}")
