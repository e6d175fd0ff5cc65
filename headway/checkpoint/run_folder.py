"""The run folder: what lies in it, who may write to it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from headway.checkpoint import checkpoint_dir as saved
from headway.checkpoint.lock import Lock
from headway.config import Config, MeshConfig, OptimConfig, UsageError, from_dict


def job() -> str:
    """The torchrun job that this process belongs to, the same after each of its restarts; empty
    without one."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return ""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"agent {os.getppid()}" if name == "none" else name


def restarted(path: Path) -> bool:
    """Whether torchrun has started this job again after a fault and `path` holds its run, so that
    it goes on."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    try:
        return json.loads((path / "run.json").read_text("utf-8"))["job"] == job()
    except (OSError, ValueError, KeyError, TypeError):
        return False


Found = tuple[Path | None, list[str]]
"""What `find_checkpoint` returns."""


class Opening(NamedTuple):
    """How a run begins."""

    run_dir: Path
    resume: bool
    """Go on with the run that `run_dir` holds."""
    overwrite: bool
    """Clear the run that `run_dir` holds."""
    start: Path | None
    """Go on from this checkpoint of another run."""

    @classmethod
    def of(cls, config: Config, resume: Path | None, overwrite: bool) -> "Opening":
        """`resume` is the folder of a run, or of a checkpoint inside one."""
        run_dir, start = split(resume) if resume is not None else (None, None)
        if run_dir is not None and start is None:
            return cls(run_dir, True, overwrite, None)
        source, run_dir = run_dir, Path(config.run_dir)
        if source is not None and run_dir.resolve() == source.resolve():  # by whatever spelling
            raise UsageError(
                f"resume: {start} is a checkpoint of {source}, which goes on from its newest one; "
                "give the run, or another run's folder with --run"
            )
        return cls(run_dir, False, overwrite, start)


def split(path: Path) -> tuple[Path, Path | None]:
    """(the run folder, the checkpoint folder in it or None) of a path to one of them."""
    if (path / "run.json").is_file() or not path.name.startswith("step-"):
        return path, None
    return path.absolute().parent.parent, path


def reopen(path: Path, lock: Lock, log: Callable[[str], None]) -> Found:
    """Opens the folder of a run to resume; what `find_checkpoint` finds."""
    open_folder(path, resume=True, overwrite=False)
    lock.take(log)
    return find_checkpoint(path)


def begin_at(start: Path | None) -> Found:
    """The checkpoint of another run from which a new one goes on, where it is to. Raises
    `UsageError` for a damaged one."""
    if start is not None and (problem := saved.verify(start)):
        raise UsageError(f"resume: {start} is damaged ({problem}); give another checkpoint")
    return start, []


def open_run(
    path: Path,
    info: dict[str, Any],
    overwrite: bool,
    lock: Lock,
    log: Callable[[str], None],
    start: Path | None = None,
) -> Path | None:
    """Makes the folder of a new run with its run.json and, where the run goes on from the
    checkpoint `start` of another one, copies of that and of the records. Returns the copy, or None.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None
    lock.take(log)
    open_folder(path, resume=False, overwrite=overwrite)
    found = None
    if start is not None:
        try:
            found = saved.copy(start, path)
            shutil.copyfile(start.parent.parent / "metrics.jsonl", path / "metrics.jsonl")
        except OSError as error:
            raise _unwritable(path, error) from None
    write_run(path, info)
    return found


def keep_optim(path: Path, optim: OptimConfig) -> None:
    """Writes the options of the optimiser with which a run goes on, such as its length, into its
    run.json, so that it is resumed with them."""
    kept = _read_run(path)
    if kept["config"].get("optim") != asdict(optim):
        kept["config"]["optim"] = asdict(optim)
        write_run(path, kept)


def open_folder(path: Path, resume: bool, overwrite: bool) -> None:
    """Makes the folder of a new run, or checks that there is a run to resume.

    Raises `UsageError` when the folder cannot be written or already holds a run; `overwrite` clears
    that run.
    """
    if resume:
        if not (path / "run.json").is_file():
            raise UsageError(f"resume: {path} holds no run.json; give the folder of a run")
        return
    held = [path / name for name in ("metrics.jsonl", "checkpoints") if (path / name).exists()]
    if held and not overwrite:
        raise UsageError(
            f"{path} already holds a run; go on with `--resume {path}`, choose another --run, "
            "or clear it with --overwrite"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        for old in held:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        (path / "report.html").unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None


def write_run(path: Path, info: dict[str, Any]) -> None:
    """Writes run.json, whole or not at all. Raises `UsageError` when the folder cannot be
    written."""
    temporary = path / ".run.json"
    try:
        text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
        # the name of a data file need not be UTF-8: what is not becomes an escape of JSON
        temporary.write_text(text, "utf-8", "backslashreplace")
        os.replace(temporary, path / "run.json")
    except OSError as error:
        raise _unwritable(path, error) from None


def resume_command(mesh: MeshConfig, path: Path | str) -> str:
    """What goes on with a run on the mesh that it had, all ranks on one host."""
    ranks = mesh.size
    launcher = f"torchrun --nproc-per-node {ranks} -m -- " if ranks > 1 else ""
    return f"{launcher}headway train --resume {path}"


def read_config(path: Path) -> Config:
    """The resolved config of a run, to resume, evaluate or sample it. Raises `UsageError` without
    one."""
    return from_dict(Config, _read_run(path)["config"])


def _read_run(path: Path) -> dict[str, Any]:
    """run.json with a `config`. Raises `UsageError` without one."""
    try:
        found = json.loads((path / "run.json").read_text("utf-8"))
        from_dict(Config, found["config"])
        return found
    except OSError as error:
        raise UsageError(f"{path} holds no readable run.json: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}/run.json is damaged ({error}); restore it") from None


def find_checkpoint(path: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and one sentence for each damaged one that was passed over.

    (None, []) when none was ever finished: the run then starts over. Raises `UsageError` when all
    are damaged.
    """
    found, problems = saved.latest(path)
    if found is None and problems:
        raise UsageError(
            f"resume: no whole checkpoint in {path}: {'; '.join(problems)}; start another --run"
        )
    return found, problems


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write {path}: {error.strerror}; choose another folder with --run")
