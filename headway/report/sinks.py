"""The metrics file: append-only JSON lines that survive a kill at any byte.

Each record is one `write`, so a reader sees complete lines or one torn last line, which every
function here tolerates."""

import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from headway.config import UsageError, cannot_write


def plain(value: object) -> object:
    """Convert to plain JSON values. JSON has no NaN and no infinity: those become null."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def _object(text: bytes) -> dict | None:
    try:
        value = json.loads(text)
    except ValueError:  # also covers bytes that are not UTF-8
        return None
    return value if isinstance(value, dict) else None


def unreadable(path: Path, error: OSError) -> UsageError:
    """Return the error of a file of a run that cannot be read."""
    return UsageError(f"cannot read {path}: {error.strerror}; give a readable run folder")


def read_metrics(path: str | Path) -> list[dict]:
    """Return the records of a metrics file, in order, without a torn last line (no newline, not
    JSON). Raises UsageError, naming path and line, for a missing file or a line that is no JSON
    object."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        fix = "give a run folder that holds metrics.jsonl"
        raise UsageError(f"no metrics at {path}; {fix}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    lines = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _object(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise UsageError(
                f"{path} line {number} is no JSON object (found {line[:40]!r}); "
                "delete that line to continue"
            )
    return records


class JsonlSink:
    """Appends records to `path`: one line each, handed to the operating system before `write`
    returns. Opening repairs a torn last line of a killed run. Raises UsageError when the file
    cannot be opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._open()
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._repair()

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def _repair(self) -> None:
        """Drop the torn last line, or end it when only its newline is missing."""
        data = self.path.read_bytes()
        if not data or data.endswith(b"\n"):
            return
        start = data.rfind(b"\n") + 1
        if _object(data[start:]) is None:
            os.ftruncate(self._fd, start)
        else:
            os.write(self._fd, b"\n")

    def write(self, record: Mapping) -> None:
        """Append one record. Non-finite numbers become null. After an OSError (disk full) the file
        still ends with a complete line."""
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
        # A lone surrogate (possible in decoded bytes) is no UTF-8; it is written as '?'.
        data = memoryview(line.encode("utf-8", errors="replace") + b"\n")
        size = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            os.ftruncate(self._fd, size)
            raise

    def resume_at(self, step: int) -> int:
        """Drop records after the checkpoint's `step`, in one rename, and return how many."""
        records = read_metrics(self.path)
        remaining = [r for r in records if r.get("step", 0) <= step]
        if len(remaining) == len(records):
            return 0
        temporary = self.path.with_name(self.path.name + ".tmp")
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in remaining)
        with open(temporary, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        os.close(self._fd)  # the old file, now without a name
        self._fd = self._open()
        return len(records) - len(remaining)

    def close(self) -> None:
        """Sync to disk and close; no record can be written afterwards."""
        os.fsync(self._fd)
        os.close(self._fd)

    def __enter__(self) -> "JsonlSink":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoSink:
    """The sink of a rank that writes no records."""

    def write(self, record: Mapping) -> None:
        """Write nothing."""

    def resume_at(self, step: int) -> int:
        """Drop nothing."""
        return 0

    def __enter__(self) -> "NoSink":
        return self

    def __exit__(self, *_: object) -> None:
        pass
