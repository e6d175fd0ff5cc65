"""Documents that are rows of a table: JSON lines, CSV, parquet, Hugging Face data sets."""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from headway.config import UsageError
from headway.data.document import Bad, Text
from headway.data.files import BadData, extra, first_line, forward, kind_of, open_file

LINE_BYTES = 1 << 28
"""Longest line of JSON; a longer one is an accident that would fill the memory."""

Rows = Iterator[Text | Bad]
"""The texts of the rows, empty ones too, and what cannot be read."""


@dataclass(frozen=True)
class HfName:
    """The parts of `hf:NAME[@CONFIG][:SPLIT[:N]]`."""

    name: str
    """On the hub, or a local folder."""
    config: str | None
    """Which of the data set's configurations; None is its default."""
    split: str
    """`train` unless given."""
    limit: int | None
    """Only the first N rows; None is all."""

    @classmethod
    def parse(cls, spec: str) -> "HfName":
        """Parse the full name of a source. Raise UsageError if it has another form."""
        name, *rest = spec.removeprefix("hf:").split(":")
        name, _, config = name.partition("@")
        split, limit = ([*rest, "", ""])[:2]
        if not name or len(rest) > 2 or (limit and not (limit.isdecimal() and int(limit))):
            form = "hf:NAME[@CONFIG][:SPLIT[:N]], with N ≥ 1 rows"
            raise UsageError(f"data source {spec!r} is not of the form {form}")
        return cls(name, config or None, split or "train", int(limit) if limit else None)


def is_json_lines(path: Path) -> bool:
    """Return whether a .json file has one object per line: its first line is an object with a
    `text`, or its first two lines are objects. Any other JSON is text."""
    objects = []
    try:
        with open_file(path) as file:
            while len(objects) < 2 and (line := file.readline(LINE_BYTES)):
                if line.strip():
                    objects.append(json.loads(line))
    except (BadData, ValueError, RecursionError):
        return False  # reading it as text says what is wrong
    dicts = [row for row in objects if isinstance(row, dict)]
    return len(dicts) == len(objects) and (len(dicts) == 2 or any("text" in row for row in dicts))


def jsonl(path: Path, start: int = 0, end: int | None = None) -> Rows:
    """Yield the `text` of each line that begins in the bytes [start, end), but for blank ones."""
    with open_file(path) as file:
        begin = start
        if start:
            forward(file, start - 1)
            begin += _end_line(file, None if end is None else end - begin + 1) - 1
        position, lines_before = begin, None
        for number in itertools.count(1):
            if end is not None and position >= end:
                return
            if not (line := file.readline(LINE_BYTES)):
                return
            position += len(line)
            if len(line) == LINE_BYTES and line[-1:] != b"\n":
                position += _end_line(file, None if end is None else end - position)
                why = f"is a line of more than {LINE_BYTES >> 20} MiB; give each document its own"
                row = Bad(why)
            elif not line.strip():
                continue
            else:
                row = _json_row(line)
            if isinstance(row, Bad):
                if lines_before is None:
                    lines_before = _lines(path, begin)
                yield Bad(f"{path}:{lines_before + number} {row.why}")
            else:
                yield Text(f"{path}, line {number:,} after byte {begin:,}", row)


def _json_row(line: bytes) -> str | Bad:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return Bad(f"is not UTF-8 (byte {error.start} of the line)")
    except ValueError as error:
        return Bad(f"is not JSON ({error}); give one object per line")
    except RecursionError:
        return Bad("is JSON nested too deeply to be read; give objects with a `text` field")
    except MemoryError:
        return Bad(f"is a line of {len(line):,} bytes, for which there is not enough memory")
    if not isinstance(row, dict):
        return Bad(f"is a {type(row).__name__}, not a JSON object with a `text` field")
    return _text(row.get("text"), list(row))


def table(path: Path) -> Rows:
    """Yield the `text` column of a .csv or .tsv file. Raise BadData if its header has none."""
    with open_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        delimiter = "\t" if kind_of(path) == ".tsv" else ","
        limit = csv.field_size_limit(LINE_BYTES)
        try:
            rows = csv.reader(_without_nul(text, path), delimiter=delimiter)
            columns = next(rows, [])
            if columns and "text" not in columns:
                raise BadData(_no_text(str(path), columns, "column"))
            place = columns.index("text") if columns else 0
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if row and len(row) != len(columns):
                    yield Bad(f"{where} has {len(row)} columns, the header {len(columns)}")
                elif row:
                    yield Text(where, row[place])
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02x}"
            raise BadData(f"{path} is not UTF-8 text (byte {byte}); convert it") from None
        except csv.Error as error:
            raise BadData(f"{path}:{rows.line_num + 1} is not a table ({error})") from None
        finally:
            csv.field_size_limit(limit)


def parquet(path: Path, start: int = 0, end: int | None = None) -> Rows:
    """Yield the `text` column of row groups [start, end); UsageError without pyarrow."""
    reader = extra("pyarrow.parquet", str(path))
    try:
        with reader.ParquetFile(path) as file:
            columns: list[str] = file.schema_arrow.names
            if "text" not in columns:
                raise BadData(_no_text(str(path), columns, "column"))
            groups = range(file.num_row_groups)
            number = sum(file.metadata.row_group(group).num_rows for group in groups[:start])
            wanted = list(groups[start:end])
            for batch in file.iter_batches(batch_size=256, columns=["text"], row_groups=wanted):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from _row(value, f"{path} row {number}", columns)
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise BadData(f"cannot read {path} as parquet: {first_line(error)}") from None


def row_groups(path: Path) -> list[int]:
    """Return the unpacked bytes of each row group of a parquet file; empty if it cannot be read."""
    try:
        with extra("pyarrow.parquet", str(path)).ParquetFile(path) as file:
            groups = range(file.num_row_groups)
            return [file.metadata.row_group(group).total_byte_size for group in groups]
    except (OSError, ValueError):
        return []


def hugging_face(spec: str) -> Rows:
    """Yield the `text` of each row. NAME may be a local folder: files, or by `save_to_disk`."""
    parsed = HfName.parse(spec)
    datasets = extra("datasets", spec)
    folder = Path(parsed.name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
            by_split = datasets.load_from_disk(str(folder))
            if parsed.split not in by_split:
                splits = ", ".join(by_split)
                raise UsageError(f"data set {spec!r} has no such split; it has {splits}")
            rows = by_split[parsed.split]
        elif (folder / "state.json").is_file():  # Dataset.save_to_disk
            if parsed.split != "train":
                fix = f"leave {parsed.split!r} out"
                raise UsageError(f"data set {spec!r} has a single split; {fix}")
            rows = datasets.load_from_disk(str(folder))
        else:
            name = str(folder) if folder.is_dir() else parsed.name
            rows = datasets.load_dataset(name, parsed.config, split=parsed.split, streaming=True)
        for number, row in enumerate(itertools.islice(rows, parsed.limit), 1):
            yield from _row(row.get("text"), f"{spec} row {number}", list(row))
    except UsageError:
        raise
    except Exception as error:  # the library's own, the hub client's and the file system's errors
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"cannot read data set {spec!r}: {reason}") from error


def _row(value: object, where: str, fields: list[str]) -> Rows:
    """Return the document of one row."""
    text = _text(value, fields)
    yield Bad(f"{where} {text.why}") if isinstance(text, Bad) else Text(where, text)


def _text(value: object, fields: list[str]) -> str | Bad:
    """Return the text of a row; lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    if "text" not in fields:
        return Bad(_no_text("", fields, "field").strip())
    if value is None:
        return Bad("has null for its `text`; fill it in or leave the row out")
    if not isinstance(value, str):
        return Bad(f"has a `text` of type {type(value).__name__}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _no_text(where: str, fields: list[str], what: str) -> str:
    there = f"{what}s: {', '.join(fields)}" if fields else f"no {what}s"
    return f"{where} has no `text` ({there}); name the {what} that holds the text `text`"


def _end_line(file: BinaryIO, most: int | None) -> int:
    """Read to the end of a line, but no more than about `most` bytes; the number of bytes."""
    size = 0
    while (most is None or size < most) and (part := file.readline(1 << 20)):
        size += len(part)
        if part[-1:] == b"\n":
            break
    return size


def _lines(path: Path, end: int) -> int:
    """Count the lines that end in the first `end` bytes of a file."""
    with open_file(path) as file:
        sizes = (min(1 << 20, end - at) for at in range(0, end, 1 << 20))
        return sum(file.read(size).count(b"\n") for size in sizes)


def _without_nul(lines: Iterator[str], path: Path) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise BadData(f"{path} is not text (a NUL byte); convert it")
        yield line
