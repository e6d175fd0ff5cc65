"""The folder of a run of an experiment: its name, and the files that say how far it is. No PyTorch.

ROOT/runs/HASH/wanted.json        what is to be trained (`Wanted`)
ROOT/runs/HASH/lease              who trains it now (checkpoint.lock)
ROOT/runs/HASH/errors             a line for each try that failed
ROOT/runs/HASH/result.json        what it gave; renamed into place at the very end"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from headway.checkpoint.lock import Holder, read_holder
from headway.config import Config, UsageError, cannot_write, from_dict, leaves
from headway.lab import edits

Edit = Callable[..., Any]
Scores = Callable[[Path], Mapping[str, float]]
"""Measures a finished run: its folder, whose last checkpoint is still there → name → a number that
is better where it is lower."""
ELSEWHERE = (
    *("recipe", "run.dir", "data.cache_dir", "data.workers", "run.keep_checkpoints", "run.track"),
)
"""Leaves that change no number of a run."""
ADDED = {
    "optim.transfer": "none",
    "optim.base_width": 128,
    "optim.base_layers": 4,
    "optim.base_batch": 4096,
    "optim.base_tokens": 2_048_000,
}
"""Leaves of later versions, at the values that change no number: older runs keep their names."""
TRIES = 3
"""Times that a run is started that fails each time."""


def config_hash(config: Config, edit: Edit | None = None, scores: Scores | None = None) -> str:
    """Return the hash of a resolved config, of the source of its edit and of what is measured at
    its end, 16 hexadecimal digits."""
    values = {
        name: value
        for name, value in leaves(config.to_dict()).items()
        if name not in ELSEWHERE and ADDED.get(name) != value
    }
    if edit is not None:
        values["edit"] = edits.source(edit)
    if scores is not None:  # functions of two modules read other globals
        values["scores"] = [scores.__module__, *edits.source(scores)]
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def trunk_hash(config: Config, edit: Edit | None = None) -> str:
    """Return the hash of what runs of several lengths have in common, up to where their rates
    part."""
    optim, data = replace(config.optim, steps=1), replace(config.data, last_batch_size=0)
    run = replace(config.run, eval_every=0, sample_every=0, checkpoint_every=0)
    return config_hash(replace(config, optim=optim, data=data, run=run), edit)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result.json of a run's folder; None where the run is not finished, or the file is
    damaged, in which case the run is done again."""
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "bits_per_byte" in result else None


def tries(folder: Path) -> list[tuple[str, int]]:
    """Return host and process of each time that a run was started."""
    try:
        lines = (folder / "attempts").read_text("utf-8").splitlines()
    except OSError:
        return []
    return [(host, int(pid)) for host, _, pid in (line.rpartition(" ") for line in lines)]


def errors(folder: Path) -> list[str]:
    """Return a line for each try of a run that failed."""
    try:
        return (folder / "errors").read_text("utf-8").splitlines()
    except OSError:
        return []


def add_error(folder: Path, line: str) -> None:
    """Note that a try failed. Raises UsageError where that cannot be written."""
    try:
        with (folder / "errors").open("a", encoding="utf-8") as file:
            file.write(" ".join(line.split()) + "\n")
    except OSError as error:
        raise cannot_write(folder, error) from None


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or absent. Raises UsageError where that cannot be done."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path.parent, error) from None


def held_by(folder: Path) -> Holder | None:
    """Return the process that trains a run, or did when it died."""
    return read_holder(folder / "lease")


class Wanted(NamedTuple):
    """What a run consists of, and where it starts."""

    config: Config
    edit: Edit | None = None
    forks: Sequence[int] = ()
    """Steps whose checkpoints are left in the folder."""
    start: str = ""
    """A checkpoint of another run, below ROOT/runs, from which this one starts; "": step 0."""


def want(root: Path, key: str, wanted: Wanted) -> bool:
    """Write what a run consists of, for workers; return False where its edit cannot be written."""
    config, edit, forks, start = wanted
    folder, edit_dict = root / "runs" / key, edits.to_dict(edit) if edit else None
    if edit and edit_dict is None:
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(root, error) from None
    value = {"config": config.to_dict(), "edit": edit_dict, "forks": [*forks], "start": start}
    write_json(folder / "wanted.json", value)
    return True


def read_wanted(folder: Path) -> Wanted:
    """Return what a run consists of that is to be trained. Raises UsageError for a damaged file,
    and where config and edit are no longer those that gave the run its name."""
    path = folder / "wanted.json"
    try:
        value = json.loads(path.read_text("utf-8"))
        config, edit = value["config"], value["edit"]
        forks, start = value["forks"], value["start"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} cannot be read ({error}); delete it") from None
    config, edit = from_dict(Config, config), edits.from_dict(edit) if edit else None
    if config_hash(config, edit) != folder.name:
        raise UsageError(f"{path}: its edit, or the config's fields, changed since; delete it")
    return Wanted(config, edit, forks, start)
