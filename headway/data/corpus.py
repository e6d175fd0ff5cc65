"""Sources → documents. A source is what the user names; its documents come in a fixed order.

stdlib                 the .py files of the running interpreter's standard library
FILE, FOLDER or GLOB   text (one document per file), .jsonl or .ndjson (one per line, field
                       `text`), .parquet (one per row, column `text`; extra `[data]`)
hf:NAME[@CONFIG][:SPLIT[:N]]
                       a Hugging Face data set, streamed, or its first N rows (extra `[data]`)
"""

import glob
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from headway.config import UsageError
from headway.data import rows
from headway.data.document import Document, Text, TextFile, open_file, split

_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib-dynload",
}
# These say how and where this machine's Python was built.
_OF_THE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")


def files(spec: str) -> list[Path]:
    """The files of a source, sorted. Folders are searched for all but hidden files and
    `__pycache__`. A `hf:NAME` has those of its local folder, or none. UsageError if nothing is
    there."""
    if spec == "stdlib":
        return _stdlib_files()
    if spec.startswith("hf:"):
        folder = Path(rows.HfName.parse(spec).name).expanduser()
        return _walk(folder) if folder.is_dir() else []
    path = Path(spec).expanduser()
    if path.is_dir():
        found = _walk(path)
        if not found:
            raise UsageError(
                f"data source {spec!r} is an empty folder; it needs text, .jsonl or .parquet files"
            )
        return found
    if path.exists():
        return [path]
    found = set()
    for match in map(Path, glob.glob(str(path), recursive=True)):
        found.update(_walk(match) if match.is_dir() else [match])
    if not found:
        what = "matches no file" if glob.has_magic(spec) else "does not exist"
        raise UsageError(
            f"data source {spec!r} {what}; give stdlib, a file, a folder, a glob or hf:NAME[:SPLIT]"
        )
    return sorted(found)


def identity(spec: str) -> list:
    """What tells two states of a source apart without reading it, JSON-ready: absolute path, size
    and modification time of each file. A data set of the Hugging Face hub is known by its name
    alone: to fetch a newer state of it, delete its folder in the cache."""
    stated = [(os.path.abspath(path), path.stat()) for path in files(spec)]
    version = list(sys.version_info[:3]) if spec == "stdlib" else []
    label = spec if spec.startswith("hf:") else "files"
    return [label, version, *([path, stat.st_size, stat.st_mtime_ns] for path, stat in stated)]


def documents(spec: str) -> Iterator[Document]:
    """Every document of a source that is not empty. UsageError on data that cannot be read."""
    if spec.startswith("hf:"):
        yield from rows.hugging_face(spec)
        return
    for path in files(spec):
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                yield from rows.jsonl(path)
            case ".parquet":
                yield from rows.parquet(path)
            case ".py" if spec == "stdlib":
                yield from _library_file(path)
            case _:
                size = path.stat().st_size
                if size:
                    yield TextFile(path, 0, size)


def train_texts(sources: Sequence[str], val_fraction: float) -> Iterator[str]:
    """The training text of several sources in pieces, for training a tokenizer, which thus never
    sees validation text."""
    for spec in sources:
        for part, document in split(documents(spec), val_fraction):
            if part == "train":
                yield from document.pieces()


def _walk(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"]
        found += [Path(root, name) for name in names if name[0] != "."]
    return sorted(path for path in found if path.is_file())


def _unreadable(error: OSError) -> None:
    raise UsageError(f"cannot read folder {error.filename}: {error.strerror}")


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for here, folders, names in os.walk(root):
        kept = [name for name in folders if not name.startswith(_OF_THE_MACHINE)]
        folders[:] = [name for name in kept if name not in _NOT_LIBRARY]
        sources = [name for name in names if name.endswith(".py")]
        found += [Path(here, name) for name in sources if not name.startswith(_OF_THE_MACHINE)]
    if not found:
        raise UsageError(
            f"this Python has no library sources in {root}; give other data than stdlib"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _library_file(path: Path) -> Iterator[Text]:
    with open_file(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return  # a few library files are in another encoding, on purpose
    if text and "\0" not in text:
        yield Text(str(path), text)
