"""The folder of a run of an experiment: its name, and the files that say how far it is. No PyTorch.

ROOT/runs/HASH/config.json        the config that is wanted, of a sweep
ROOT/runs/HASH/lease, lease-2, …  who trains it now (lab.lease)
ROOT/runs/HASH/errors             a line for each try that failed
ROOT/runs/HASH/result.json        what it gave; renamed into place at the very end"""

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headway.checkpoint.lock import Holder, read_holder
from headway.config import Config, UsageError, cannot_write, leaves

ELSEWHERE = ("recipe", "run.dir", "data.cache_dir", "data.workers", "run.keep_checkpoints")
"""Leaves that change no number of a run."""
TRIES = 3
"""Times that a run is started that fails each time."""


def config_hash(config: Config, edit: Callable[..., Any] | None = None) -> str:
    """Return the hash of a resolved config and of the source of its edit, 16 hexadecimal digits."""
    values = {k: v for k, v in leaves(config.to_dict()).items() if k not in ELSEWHERE}
    if edit is not None:
        values["edit"] = _source(edit)
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(edit: Callable[..., Any]) -> list[str]:
    """Return the source of a function, and the values that it is bound to."""
    if isinstance(edit, functools.partial):
        return [*_source(edit.func), repr(edit.args), repr(sorted(edit.keywords.items()))]
    bound = inspect.getclosurevars(edit).nonlocals
    return [inspect.getsource(edit), repr(sorted(bound.items()))]


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result.json of a run's folder; None where the run is not finished, or the file is
    damaged, in which case the run is done again."""
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "bits_per_byte" in result else None


def errors(folder: Path) -> list[str]:
    """Return a line for each try of a run that failed."""
    try:
        return (folder / "errors").read_text("utf-8").splitlines()
    except OSError:
        return []


def add_error(folder: Path, line: str) -> None:
    """Note that a try failed."""
    with (folder / "errors").open("a", encoding="utf-8") as file:
        file.write(" ".join(line.split()) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or absent. Raises UsageError where that cannot be done."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path.parent, error) from None


def held_by(folder: Path) -> Holder | None:
    """Return the process that trains a run, or did when it died."""
    return read_holder(folder / "lease")


def want(root: Path, key: str, config: Config) -> Path:
    """Ask for a run, and return its folder."""
    folder = root / "runs" / key
    if not (folder / "config.json").is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(root, error) from None
        write_json(folder / "config.json", config.to_dict())
    return folder


def wanted(root: Path, finished: set[str]) -> list[Path]:
    """Return the folders of the runs that are asked for and neither finished nor given up, in the
    order in which they were; `finished` remembers those that are."""
    open_runs: list[tuple[float, Path]] = []
    for entry in os.scandir(root / "runs"):
        folder = Path(entry.path)
        if entry.name in finished:
            continue
        try:
            asked = (folder / "config.json").stat().st_mtime_ns
        except OSError:
            continue
        if (folder / "result.json").is_file() or len(errors(folder)) >= TRIES:
            finished.add(entry.name)
        else:
            open_runs.append((asked, folder))
    return [folder for _, folder in sorted(open_runs)]


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of a run that is asked for. Raises UsageError for a damaged file."""
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}/config.json cannot be read ({error}); delete it") from None
