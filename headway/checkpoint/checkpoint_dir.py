"""The checkpoint folders of a run: find, verify, commit, copy and remove them."""

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


def checkpoints(run_dir: Path) -> Path:
    """Return the folder of the checkpoints of a run."""
    return run_dir / "checkpoints"


def latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that passes `verify`, and a line for each newer that fails."""
    problems = []
    for _, path in reversed(_listed(checkpoints(run_dir))):
        problem = verify(path)
        if not problem:
            return path, problems
        problems.append(f"{path.name} is damaged ({problem})")
    return None, problems


def verify(path: Path) -> str:
    """Return what is wrong with a checkpoint, in a few words; "" if every size and SHA-256 fits."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())["files"]
        for name in dict.fromkeys((*manifest, *_NEEDED)):
            size = (path / name).stat().st_size
            if size != manifest[name]["size"]:
                return f"{name} has {size} bytes instead of {manifest[name]['size']}"
            if digest(path / name) != manifest[name]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read: {error}"
    return ""


def holds_weights_alone(path: Path) -> bool:
    """Return whether a checkpoint is that of an imported model, without progress of a run."""
    try:
        return "progress" not in json.loads((path / "state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False


def latest_up_to(run_dir: Path, step: int) -> Path | None:
    """Return the newest checkpoint of at most `step` steps, not verified; None without one."""
    paths = [path for number, path in _listed(checkpoints(run_dir)) if number <= step]
    return paths[-1] if paths else None


def copy(path: Path, run_dir: Path) -> Path:
    """Copy a checkpoint to another run folder, complete or not at all; return its path."""
    final = checkpoints(run_dir) / path.name
    shutil.copytree(path, create_temporary(final), dirs_exist_ok=True)
    commit(final)
    return final


def set_aside_after(run_dir: Path, step: int) -> list[str]:
    """Rename checkpoints later than `step` to `*.damaged`, so that they never count as the newest
    again; return their new names."""
    moved = []
    for number, path in _listed(checkpoints(run_dir)):
        if number > step:
            target = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)
            moved.append(target.name)
    return moved


def temporary(final: Path) -> Path:
    """Return the folder in which a checkpoint is written until it is complete."""
    return final.parent / f".tmp-{final.name}"


def create_temporary(final: Path) -> Path:
    """Create an empty temporary folder; remove those that killed processes left."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(".tmp-*"):
        shutil.rmtree(stale)
    temporary(final).mkdir()
    return temporary(final)


def commit(final: Path) -> None:
    """Sync the temporary folder and give it its final name. An older checkpoint of that step
    (written before a resume) stays until the new one is in its place."""
    complete = temporary(final)
    for path in (*complete.iterdir(), complete):
        fsync(path)
    if final.exists():
        replaced = final.with_name(f"{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)  # of a process killed after its renames
        os.replace(final, replaced)
    os.replace(complete, final)
    fsync(final.parent)


def remove_old(parent: Path, keep: int, keep_up_to: Sequence[int] = ()) -> None:
    """Remove all but the newest `keep` and, for each step in `keep_up_to`, the newest one up to
    that step. A checkpoint that cannot be removed now is removed after a later save."""
    listed = _listed(parent)
    current = [(step, path) for step, path in listed if not path.name.endswith(".replaced")]
    wanted = [path for _, path in current[-keep:]]
    for last in keep_up_to:
        wanted += [path for step, path in current if step <= last][-1:]
    for _, path in listed:
        if path not in wanted:
            with contextlib.suppress(OSError):
                doomed = temporary(path)  # so that half of it never counts as a checkpoint
                os.replace(path, doomed)
                shutil.rmtree(doomed)


def digest(path: Path) -> dict[str, Any]:
    """Return the size of a file in bytes and its SHA-256. Not a CRC: SHA-256 costs under a second
    per GiB, finds any damage, and lets people compare checkpoints by one line."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _listed(parent: Path) -> list[tuple[int, Path]]:
    """Return (step, folder), oldest first; a replaced folder before the one that replaced it."""
    entries = []
    for path in parent.glob("step-*"):
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            entries.append((int(match[1]), not match[2], path))
    return [(step, path) for step, _, path in sorted(entries)]
