"""The run folder: its files, and who may write to it."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from headway.checkpoint import checkpoint_dir
from headway.checkpoint.lock import Lock
from headway.config import Config, MeshConfig, OptimConfig, UsageError, cannot_write, from_dict


def torchrun_job() -> str:
    """Return the torchrun job of this process, the same after each restart; "" without one."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return ""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"agent {os.getppid()}" if name == "none" else name


def is_restart(path: Path) -> bool:
    """Return whether torchrun restarted this job after a fault, and `path` holds its run."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    try:
        return json.loads((path / "run.json").read_text("utf-8"))["job"] == torchrun_job()
    except (OSError, ValueError, KeyError, TypeError):
        return False


LatestCheckpoint = tuple[Path | None, list[str]]
"""What `find_checkpoint` returns."""


class RunStart(NamedTuple):
    """How a run begins."""

    run_dir: Path
    resume: bool
    """Resume the run that `run_dir` holds."""
    overwrite: bool
    """Clear the run that `run_dir` holds."""
    fork_from: Path | None
    """Start from this checkpoint of another run."""

    @classmethod
    def of(cls, config: Config, resume: Path | None, overwrite: bool) -> "RunStart":
        """`resume` is the folder of a run, or of a checkpoint inside one."""
        run_dir, fork_from = split_path(resume) if resume is not None else (None, None)
        if run_dir is not None and fork_from is None:
            return cls(run_dir, True, overwrite, None)
        source, run_dir = run_dir, Path(config.run_dir)
        if source is not None and run_dir.resolve() == source.resolve():  # by whatever spelling
            raise UsageError(
                f"resume: {fork_from} is a checkpoint of {source}, which goes on from its newest "
                "one; give the run, or another run's folder with --run"
            )
        return cls(run_dir, False, overwrite, fork_from)


def split_path(path: Path) -> tuple[Path, Path | None]:
    """Return (the run folder, the checkpoint folder in it or None) of a path to one of them."""
    if (path / "run.json").is_file() or not path.name.startswith("step-"):
        return path, None
    return path.absolute().parent.parent, path


def find_start(start: RunStart, lock: Lock, log: Callable[[str], None]) -> LatestCheckpoint:
    """Return the checkpoint from which a run starts, if any: the latest of a run to resume, whose
    folder is locked, as `find_checkpoint` does, or that of another run. Raises `UsageError` where
    there is no run, or the checkpoint is damaged."""
    path, fork_from = start.run_dir, start.fork_from
    if start.resume:
        if not (path / "run.json").is_file():
            raise UsageError(f"resume: {path} holds no run.json; give the folder of a run")
        lock.acquire(log)
        return find_checkpoint(path)
    if fork_from is not None and (problem := checkpoint_dir.verify(fork_from)):
        raise UsageError(f"resume: {fork_from} is damaged ({problem}); give another checkpoint")
    return fork_from, []


def create_run(
    start: RunStart, info: dict[str, Any], lock: Lock, log: Callable[[str], None]
) -> Path | None:
    """Create and lock the folder of a new run with its run.json and, where the run starts from a
    checkpoint of another one, copies of that and of the records. Return the copy, or None. Raises
    `UsageError` when the folder cannot be written or already holds a run and `start.overwrite`
    does not clear it."""
    path, fork_from = start.run_dir, start.fork_from
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
    lock.acquire(log)
    old_files = [path / name for name in ("metrics.jsonl", "checkpoints") if (path / name).exists()]
    if old_files and not start.overwrite:
        raise UsageError(
            f"{path} already holds a run; go on with `--resume {path}`, choose another --run, "
            "or clear it with --overwrite"
        )
    copy = None
    try:
        for old in old_files:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        shutil.rmtree(path / "track", ignore_errors=True)
        for name in ("report.html", "documents.npz"):
            (path / name).unlink(missing_ok=True)
        if fork_from is not None:
            copy = checkpoint_dir.copy(fork_from, path)
            shutil.copyfile(fork_from.parent.parent / "metrics.jsonl", path / "metrics.jsonl")
    except OSError as error:
        raise cannot_write(path, error) from None
    _write_run_json(path, info)
    return copy


def check_dtype(path: Path, derived: Mapping[str, str]) -> None:
    """Raise `UsageError` where `run.dtype=auto` was another dtype on the machine on which a run
    began: its losses would change in the middle of it."""
    name = "run.dtype"
    before = _read_run_json(path).get("derived", {}).get(name, "").partition(":")[0]
    now = derived.get(name, "").partition(":")[0]
    if before and now and before != now:
        raise UsageError(
            f"resume: {name}=auto was {before} where {path} began and is {now} on this machine; "
            f"give --{name} {before} to go on as it began, or --{name} {now} to change it"
        )


def update_optim(path: Path, optim: OptimConfig) -> None:
    """Write the optimiser options with which a run is resumed, such as its length, to its run.json,
    so that later resumes use them."""
    info = _read_run_json(path)
    if info["config"].get("optim") != asdict(optim):
        info["config"]["optim"] = asdict(optim)
        _write_run_json(path, info)


def _write_run_json(path: Path, info: dict[str, Any]) -> None:
    """Write run.json, complete or not at all. Raises `UsageError` where that is impossible."""
    temporary = path / ".run.json"
    try:
        text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
        # the name of a data file need not be UTF-8: other bytes become JSON escapes
        temporary.write_text(text, "utf-8", "backslashreplace")
        os.replace(temporary, path / "run.json")
    except OSError as error:
        raise cannot_write(path, error) from None


def resume_command(mesh: MeshConfig, path: Path | str) -> str:
    """Return the command that resumes a run on the same mesh, all ranks on one host."""
    launcher = f"torchrun --nproc-per-node {mesh.size} -m -- " if mesh.size > 1 else ""
    return f"{launcher}headway train --resume {path}"


def read_config(path: Path) -> Config:
    """Return the resolved config of a run. Raises `UsageError` without one."""
    return from_dict(Config, _read_run_json(path)["config"])


def _read_run_json(path: Path) -> dict[str, Any]:
    """Return run.json with a `config`. Raises `UsageError` without one."""
    try:
        info = json.loads((path / "run.json").read_text("utf-8"))
        from_dict(Config, info["config"])
        return info
    except OSError as error:
        raise UsageError(f"{path} holds no readable run.json: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}/run.json is damaged ({error}); restore it") from None


def find_checkpoint(path: Path) -> LatestCheckpoint:
    """Return the latest undamaged checkpoint, and one sentence for each damaged newer one;
    (None, []) when none was ever finished: the run then starts over. Raises `UsageError` when all
    are damaged."""
    checkpoint, problems = checkpoint_dir.latest(path)
    if checkpoint is None and problems:
        raise UsageError(
            f"{path} has no whole checkpoint: {'; '.join(problems)}; restore it, or train again"
        )
    return checkpoint, problems
