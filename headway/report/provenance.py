"""The provenance of a number: machine, versions, commit; for run.json and benchmarks."""

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from headway import __version__

PACKAGE = Path(__file__).resolve().parents[1]


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    """Return the cores this process may use, which a container or a batch system may limit."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    """Return the memory of the machine, or of the container when that is less."""
    if os.name != "posix":
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return round(total / 2**30, 1)


def machine() -> dict[str, str | int | float | None]:
    """Return the hardware: cpu (model), cores (usable), memory_gib, cpu_capability (torch's vector
    path), os, gpu (name or None), gpus (count), gpu_memory_gib (of one, or None). No host name and
    no user name."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory_gib": _memory_gib(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": gpu and gpu.name,
        "gpus": torch.cuda.device_count() if gpu else 0,
        "gpu_memory_gib": gpu and round(gpu.total_memory / 2**30, 1),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions of python, torch, cuda (what torch was built for, or `none`), triton (or
    `unknown`), numpy, safetensors and headway."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "safetensors": _version("safetensors"),
        "headway": __version__,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # never lock the user's index
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=20, env=environment
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit(folder: str | Path = PACKAGE, besides: str = "") -> tuple[str, bool]:
    """Return (commit hash, dirty) of the source tree that holds `folder`; ("unknown", False)
    outside git.

    Dirty: a tracked file anywhere in the tree, `besides` those of one folder of its root, differs
    from the commit, or `folder` holds a new file. A package installed below somebody else's
    repository is not tracked there, hence `unknown`."""
    folder = Path(folder)
    head = _git(folder, "rev-parse", "--verify", "HEAD")
    if head is None or not _git(folder, "ls-files", "--", "."):
        return "unknown", False
    paths = [":/", f":(top,exclude){besides}"] if besides else [":/"]
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *paths)
    new = _git(folder, "status", "--porcelain", "--", ".")
    return head, bool(changed or new)


def provenance() -> dict:
    """Return {"commit", "dirty", "versions", "machine"}, the part of run.json and of a benchmark's
    JSON that says where it was made."""
    head, dirty = commit()
    return {"commit": head, "dirty": dirty, "versions": versions(), "machine": machine()}
