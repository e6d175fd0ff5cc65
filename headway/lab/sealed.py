"""JSON objects with a hash of themselves: an edit by hand is seen when they are read."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from headway.config import UsageError

HASH = "sha256"


class Kind(NamedTuple):
    """What an object is."""

    name: str
    """Its `kind`."""
    command: str
    """The command that writes one."""


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return the object with its hash."""
    return {**value, HASH: _digest(value)}


def read_sealed(path: Path, kind: Kind) -> dict[str, Any]:
    """Return the object of a file, or of its last line. Raises UsageError where the file is not of
    that kind, or was changed after it was written."""
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    value = None
    for part in (text, text.rpartition("\n")[2]):
        try:
            value = json.loads(part)
            break
        except ValueError:
            continue
    if not isinstance(value, dict) or value.get("kind") != kind.name:
        raise UsageError(f"{path} is no {kind.name}; make one with `{kind.command}`")
    rest = {name: v for name, v in value.items() if name != HASH}
    if value.get(HASH) != _digest(rest):
        raise UsageError(f"{path} was changed after it was written: its hash does not fit")
    return rest


def file_sha256(path: Path) -> str:
    """Return the hash of a file, 64 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
