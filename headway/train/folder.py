"""The run folder: what lies in it, who may write to it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from headway.config import Config, MeshConfig, UsageError, from_dict
from headway.train import saved


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


def open_run(path: Path, info: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Makes the folder of a new run with its run.json, or checks the one of a run to resume."""
    open_folder(path, resume, overwrite)
    if not resume:
        write_run(path, info)


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
    ranks = mesh.dp * mesh.hp * mesh.ep
    launcher = f"torchrun --nproc-per-node {ranks} -m -- " if ranks > 1 else ""
    return f"{launcher}headway train --resume {path}"


def read_config(path: Path) -> Config:
    """The resolved config of a run, to resume, evaluate or sample it. Raises `UsageError` without
    one."""
    try:
        return from_dict(Config, json.loads((path / "run.json").read_text("utf-8"))["config"])
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
