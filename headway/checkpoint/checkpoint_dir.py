"""The checkpoints that lie in a run folder: found, verified, put in place, copied, removed."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NAME = re.compile(r"step-(\d+)(\.replaced)?")
_NEEDED = ("config.json", "state.json")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the text is one line."""


def folder(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_dir / "checkpoints"


def latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes `verify`, and one line for each newer one that does not."""
    problems = []
    for _, path in reversed(_listed(folder(run_dir))):
        problem = verify(path)
        if not problem:
            return path, problems
        problems.append(f"{path.name} is damaged ({problem})")
    return None, problems


def verify(path: Path) -> str:
    """What is wrong with a checkpoint folder, in a few words; empty when every file has its size
    and SHA-256."""
    try:
        wanted = json.loads((path / "manifest.json").read_text())["files"]
        for name in dict.fromkeys((*wanted, *_NEEDED)):
            size = (path / name).stat().st_size
            if size != wanted[name]["size"]:
                return f"{name} has {size} bytes instead of {wanted[name]['size']}"
            if fingerprint(path / name) != wanted[name]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read: {error}"
    return ""


def newest_up_to(run_dir: Path, step: int) -> Path | None:
    """The newest checkpoint of at most `step` steps, not verified; None without one."""
    found = [path for number, path in _listed(folder(run_dir)) if number <= step]
    return found[-1] if found else None


def copy(path: Path, run_dir: Path) -> Path:
    """A copy of a checkpoint in another run folder, whole or not at all; returns its path."""
    final = folder(run_dir) / path.name
    made = start(final)
    shutil.copytree(path, made, dirs_exist_ok=True)
    commit(final)
    return final


def set_aside_after(run_dir: Path, step: int) -> list[str]:
    """Renames checkpoints later than `step` to `*.damaged`, so that they cannot count as the newest
    again."""
    moved = []
    for number, path in _listed(folder(run_dir)):
        if number > step:
            target = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)
            moved.append(target.name)
    return moved


def temporary(final: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return final.parent / f".tmp-{final.name}"


def start(final: Path) -> Path:
    """An empty temporary folder; those of processes that were killed while they wrote go away."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(".tmp-*"):
        shutil.rmtree(stale)
    made = temporary(final)
    made.mkdir()
    return made


def commit(final: Path) -> None:
    """Gives the temporary folder its name. A checkpoint of that step that is there already (written
    again after a resume) stays until the new one is in its place."""
    made = temporary(final)
    for path in (*made.iterdir(), made):
        sync(path)
    if final.exists():
        replaced = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)  # of a process killed after its renames
        os.replace(final, replaced)
    os.replace(made, final)
    sync(final.parent)


def remove_old(parent: Path, keep: int, up_to: Sequence[int] = ()) -> None:
    """Removes all but the newest `keep` and, for each step in `up_to`, the newest one up to there.
    Best effort: a checkpoint that cannot be removed now is removed after a later save."""
    listed = _listed(parent)
    whole = [(step, path) for step, path in listed if not path.name.endswith(".replaced")]
    kept = [path for _, path in whole[-keep:]]
    for last in up_to:
        kept += [path for step, path in whole if step <= last][-1:]
    for _, path in listed:
        if path not in kept:
            with contextlib.suppress(OSError):
                doomed = temporary(path)  # half removed is never half a checkpoint
                os.replace(path, doomed)
                shutil.rmtree(doomed)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256. Not a CRC: it costs under a second per GiB, finds any damage, and
    lets people compare checkpoints by one line."""
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As people read it."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def sync(path: Path) -> None:
    """A file or folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _listed(parent: Path) -> list[tuple[int, Path]]:
    """(step, folder), oldest first; a replaced folder sorts before the one that replaces it."""
    found = []
    if parent.is_dir():
        for path in parent.iterdir():
            if (match := _NAME.fullmatch(path.name)) and path.is_dir():
                found.append((int(match[1]), not match[2], path))
    return [(step, path) for step, _, path in sorted(found)]
