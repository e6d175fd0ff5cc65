"""Sources → documents. A source is what the user names; a document is one text, read lazily and in a fixed order.

stdlib                 the .py files of the running interpreter's standard library, one document each
FILE, FOLDER or GLOB   text (one document per file), .jsonl / .ndjson (one per line, field `text`),
                       .parquet (one per row, column `text`; extra `[data]`)
hf:NAME[@CONFIG][:SPLIT[:N]]   a Hugging Face data set, streamed (extra `[data]`), or its first N rows
"""

import codecs
import glob
import importlib
import itertools
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Literal

from headway.config import UsageError

Split = Literal["train", "val"]

PIECE_BYTES = 1 << 20
"""A text file is read in pieces of this size, cut after a newline, so that a file of any size fits in memory."""

_STDLIB_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib-dynload",
}


@dataclass(frozen=True)
class Text:
    """A document held in memory: a row of a data set, or a small file."""

    name: str
    """Where it came from, for error messages."""
    text: str
    """The document."""

    def pieces(self) -> Iterator[str]:
        """The text, in one piece."""
        yield self.text

    def halves(self, val_fraction: float) -> tuple["Text", "Text"]:
        """Head and tail: the first 1 − val_fraction of the characters, and the rest."""
        cut = int(len(self.text) * (1 - val_fraction))
        return Text(self.name, self.text[:cut]), Text(self.name, self.text[cut:])


@dataclass(frozen=True)
class TextFile:
    """The bytes [start, end) of a UTF-8 text file as one document, read only when asked for."""

    path: Path
    start: int
    end: int

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about a megabyte. UsageError if it is not UTF-8 text or holds NUL bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        carry = ""
        with _open(self.path) as file:
            file.seek(self.start)
            position = self.start
            while position < self.end:
                block = file.read(min(PIECE_BYTES, self.end - position))
                if not block:
                    raise UsageError(f"{self.path} became shorter while it was read; try again")
                if b"\0" in block:
                    at = position + block.index(b"\0")
                    raise _binary(self.path, f"a NUL byte at {at:,}")
                final = position + len(block) >= self.end
                try:
                    text = carry + decoder.decode(block, final)
                except UnicodeDecodeError as error:
                    # error.start counts from the bytes that the decoder kept of the block before.
                    at = position + len(block) - len(error.object) + error.start
                    raise _binary(
                        self.path, f"byte 0x{error.object[error.start]:02x} at {at:,}"
                    ) from None
                if position == 0:
                    text = text.removeprefix("\ufeff")
                position += len(block)
                cut = len(text) if final else text.rfind("\n") + 1 or len(text)
                carry = text[cut:]
                if cut:
                    yield text[:cut]

    def halves(self, val_fraction: float) -> tuple["TextFile", "TextFile"]:
        """Head and tail: the first 1 − val_fraction of the bytes, up to a whole character, and the rest."""
        cut = self.start + int((self.end - self.start) * (1 - val_fraction))
        with _open(self.path) as file:
            file.seek(cut)
            following = file.read(4)
        cut += next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)
        return TextFile(self.path, self.start, cut), TextFile(self.path, cut, self.end)


Document = Text | TextFile


@dataclass(frozen=True)
class HfName:
    """The parts of `hf:NAME[@CONFIG][:SPLIT[:N]]`."""

    name: str
    config: str | None
    split: str
    limit: int | None

    @classmethod
    def parse(cls, spec: str) -> "HfName":
        """From the text after `hf:`. UsageError if it has another form."""
        name, *rest = spec.split(":")
        name, _, config = name.partition("@")
        if (
            not name
            or len(rest) > 2
            or (len(rest) == 2 and not (rest[1].isdecimal() and int(rest[1])))
        ):
            raise UsageError(
                f"data source 'hf:{spec}' should read hf:NAME[@CONFIG][:SPLIT[:N]], N ≥ 1 rows"
            )
        return cls(
            name,
            config or None,
            rest[0] if rest and rest[0] else "train",
            int(rest[1]) if rest[1:] else None,
        )


def files(spec: str) -> list[Path]:
    """The files of a source in a fixed (sorted) order, hidden ones and `__pycache__` left out of folders. For `hf:NAME`
    those of a local folder, else none. UsageError if nothing is there."""
    if spec == "stdlib":
        return _stdlib_files()
    if spec.startswith("hf:"):
        folder = Path(HfName.parse(spec[3:]).name).expanduser()
        return _walk(folder) if folder.is_dir() else []
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = _walk(path)
        if not found:
            raise UsageError(
                f"data source {spec!r} is an empty folder; it needs text, .jsonl or .parquet files"
            )
        return found
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    if not matches:
        kind = "matches no file" if glob.has_magic(spec) else "does not exist"
        raise UsageError(
            f"data source {spec!r} {kind}; give stdlib, a file, a folder, a glob or hf:NAME[:SPLIT]"
        )
    nested = (_walk(match) if match.is_dir() else [match] for match in matches)
    return sorted(set(itertools.chain.from_iterable(nested)))


def identity(spec: str) -> list:
    """What tells two states of a source apart without reading it: absolute path, size and modification time of every
    file (JSON-ready). A data set of the Hugging Face hub is known by its name alone: its cache is not refreshed."""
    stated = [(os.path.abspath(path), path.stat()) for path in files(spec)]
    label = (
        f"stdlib {sys.version_info[:2]}"
        if spec == "stdlib"
        else spec
        if spec.startswith("hf:")
        else "files"
    )
    return [label, *([path, stat.st_size, stat.st_mtime_ns] for path, stat in stated)]


def documents(spec: str) -> Iterator[Document]:
    """Every document of a source that is not empty, in a fixed order. UsageError on data that cannot be read."""
    if spec.startswith("hf:"):
        yield from _hf(spec)
        return
    for path in files(spec):
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                yield from _jsonl(path)
            case ".parquet":
                yield from _parquet(path)
            case _ if spec == "stdlib":
                yield from _source_file(path)
            case _:
                size = path.stat().st_size
                if size:
                    yield TextFile(path, 0, size)


def split(stream: Iterable[Document], val_fraction: float) -> Iterator[tuple[Split, Document]]:
    """Mark each document as training or validation, in one pass and without knowing how many there are.

    Each run of about 1/val_fraction documents gives one to validation, at a pseudo-random place of the run (a fixed
    function of its number), so the share is exact to one document and follows no period of the data. Two documents
    are enough for one each; a single one is cut into head (training) and tail (validation).
    """
    iterator = iter(stream)
    first, second = next(iterator, None), next(iterator, None)
    if first is None:
        return
    if second is None:
        head, tail = first.halves(val_fraction)
        yield "train", head
        yield "val", tail
        return
    share = Fraction(str(val_fraction))
    picked = -1
    run = -1
    for number, document in enumerate(itertools.chain((first, second), iterator)):
        if number * share // 1 != run:
            run = number * share // 1
            length = -(-(run + 1) // share) - number
            # The first run gives its second document, so that two documents make both splits.
            picked = 1 if run == 0 else number + _scramble(int(run)) % int(length)
        yield ("val" if number == picked else "train"), document


def train_texts(sources: Sequence[str], val_fraction: float) -> Iterator[str]:
    """The training text of several sources in pieces, for training a tokenizer: it never sees validation text."""
    for spec in sources:
        for part, document in split(documents(spec), val_fraction):
            if part == "train":
                yield from document.pieces()


def _scramble(value: int) -> int:
    """Steele, Lea & Flood's splitmix64 of one integer."""
    mask = (1 << 64) - 1
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def _open(path: Path):
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _binary(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path} is not UTF-8 text ({what}); convert it, or choose files by a glob such as 'DIR/**/*.txt'"
    )


def _walk(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [
            name for name in folders if not name.startswith(".") and name != "__pycache__"
        ]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _unreadable(error: OSError) -> None:
    raise UsageError(f"cannot read folder {error.filename}: {error.strerror}")


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for here, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in _STDLIB_LEFT_OUT and not name.startswith("config-")
        ]
        # _sysconfigdata and sitecustomize say how and where this machine's Python was built; they are no library code.
        machine = ("_sysconfigdata", "sitecustomize", "usercustomize")
        found += [
            Path(here, name)
            for name in names
            if name.endswith(".py") and not name.startswith(machine)
        ]
    if not found:
        raise UsageError(
            f"this Python has no library source files in {root}; give another data source than stdlib"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _source_file(path: Path) -> Iterator[Text]:
    with _open(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return  # a few library files are in another encoding, on purpose
    if text and "\0" not in text:
        yield Text(str(path), text)


def _row(value: object, where: str, fields: str) -> Iterator[Text]:
    """The document of one row; lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    if not isinstance(value, str):
        kind = (
            "no `text` field"
            if value is None
            else f"a `text` field of type {type(value).__name__}, not a string"
        )
        raise UsageError(
            f"{where} has {kind} (fields: {fields}); rename the field with the text to `text`"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if value:
        yield Text(where, value)


def _jsonl(path: Path) -> Iterator[Text]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{where} is not UTF-8 text (byte {error.start} of the line)"
                ) from None
            except ValueError as error:
                raise UsageError(
                    f"{where} is not JSON ({error}); each line needs one object"
                ) from None
            if not isinstance(row, dict):
                raise UsageError(
                    f"{where} is not a JSON object with a `text` field, but {type(row).__name__}"
                )
            yield from _row(row.get("text"), where, ", ".join(row) or "none")


def _parquet(path: Path) -> Iterator[Text]:
    parquet = _extra("pyarrow.parquet", str(path))
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise UsageError(
                f"{path} has no `text` column (columns: {', '.join(columns)}); rename the one with the text"
            )
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=["text"]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield from _row(value, f"{path} row {number}", ", ".join(columns))
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot read {path} as parquet: {_first_line(error)}") from None


def _hf(spec: str) -> Iterator[Text]:
    parsed = HfName.parse(spec[3:])
    datasets = _extra("datasets", spec)
    folder = Path(parsed.name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():  # written by DatasetDict.save_to_disk
            rows = datasets.load_from_disk(str(folder))[parsed.split]
        elif (folder / "state.json").is_file():  # written by Dataset.save_to_disk
            rows = datasets.load_from_disk(str(folder))
        else:
            name = str(folder) if folder.is_dir() else parsed.name
            rows = datasets.load_dataset(name, parsed.config, split=parsed.split, streaming=True)
        for number, row in enumerate(itertools.islice(rows, parsed.limit), 1):
            yield from _row(row.get("text"), f"{spec} row {number}", ", ".join(row))
    except UsageError:
        raise
    except (
        Exception
    ) as error:  # the library raises its own, the hub client's and the file system's errors
        raise UsageError(
            f"cannot read data set {spec!r}: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _extra(module: str, wanted_by: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"{wanted_by} needs {module.split('.')[0]}: pip install 'headway[data]'"
        ) from None
