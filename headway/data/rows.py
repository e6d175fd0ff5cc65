"""Documents that are rows of a table: JSON lines, parquet, Hugging Face data sets. The text is in
`text`."""

import importlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from headway.config import UsageError
from headway.data.document import Text, open_file


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
        """From a whole source name. UsageError if it has another form."""
        name, *rest = spec.removeprefix("hf:").split(":")
        name, _, config = name.partition("@")
        split, limit = ([*rest, "", ""])[:2]
        if not name or len(rest) > 2 or (limit and not (limit.isdecimal() and int(limit))):
            form = "hf:NAME[@CONFIG][:SPLIT[:N]], with N ≥ 1 rows"
            raise UsageError(f"data source {spec!r} is not of the form {form}")
        return cls(name, config or None, split or "train", int(limit) if limit else None)


def jsonl(path: Path) -> Iterator[Text]:
    """Each line's `text`; blank lines are left out. UsageError, with file and line, for anything
    else."""
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise UsageError(f"{where} is not UTF-8 (byte {error.start} of the line)") from None
            except ValueError as error:
                raise UsageError(
                    f"{where} is not JSON ({error}); give one object per line"
                ) from None
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise UsageError(f"{where} is a {kind}, not a JSON object with a `text` field")
            yield from _row(row.get("text"), where, list(row))


def parquet(path: Path) -> Iterator[Text]:
    """Each row's `text` column, read by row group. UsageError without pyarrow, or if it is no such
    file."""
    reader = _extra("pyarrow.parquet", str(path))
    try:
        file = reader.ParquetFile(path)
        columns: list[str] = file.schema_arrow.names
        if "text" not in columns:
            raise _no_text(str(path), columns)
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=["text"]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield from _row(value, f"{path} row {number}", columns)
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise UsageError(f"cannot read {path} as parquet: {_first_line(error)}") from None


def hugging_face(spec: str) -> Iterator[Text]:
    """Each row's `text`, streamed. NAME may be a local folder: data files, or what `save_to_disk`
    wrote."""
    parsed = HfName.parse(spec)
    datasets = _extra("datasets", spec)
    folder = Path(parsed.name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
            by_split = datasets.load_from_disk(str(folder))
            if parsed.split not in by_split:
                raise UsageError(
                    f"data set {spec!r} has no such split; it has {', '.join(by_split)}"
                )
            rows = by_split[parsed.split]
        elif (folder / "state.json").is_file():  # Dataset.save_to_disk
            if parsed.split != "train":
                raise UsageError(
                    f"data set {spec!r} has a single split; leave {parsed.split!r} out"
                )
            rows = datasets.load_from_disk(str(folder))
        else:
            name = str(folder) if folder.is_dir() else parsed.name
            rows = datasets.load_dataset(name, parsed.config, split=parsed.split, streaming=True)
        for number, row in enumerate(itertools.islice(rows, parsed.limit), 1):
            yield from _row(row.get("text"), f"{spec} row {number}", list(row))
    except UsageError:
        raise
    except Exception as error:  # the library's own, the hub client's and the file system's errors
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UsageError(f"cannot read data set {spec!r}: {reason}") from error


def _row(value: object, where: str, fields: list[str]) -> Iterator[Text]:
    """The document of one row; lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    if value is None:
        raise _no_text(where, fields)
    if not isinstance(value, str):
        raise UsageError(
            f"{where} has a `text` of type {type(value).__name__}; it must be a string"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if value:
        yield Text(where, value)


def _no_text(where: str, fields: list[str]) -> UsageError:
    there = f"fields: {', '.join(fields)}" if fields else "no fields"
    return UsageError(f"{where} has no `text` ({there}); name the field that holds the text `text`")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _extra(module: str, wanted_by: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UsageError(f"{wanted_by} needs {package}: pip install 'headway[data]'") from None
