"""Tile sizes: a default for every shape, or what was measured on this GPU and kept on disk.

A run never measures by itself: the first step of a job, a captured graph and N ranks would all
choose differently. `bench/gpu_day.py --stages tiles` measures, `bench/gpu_tiles.py --keep` keeps
the fastest, and every later process on a GPU of that name, with that version of Triton, reads the
file once."""

import functools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from headway.config import cache_root


@dataclass(frozen=True, slots=True)
class Tiles:
    """The sizes of a kernel's tiles."""

    rows: int
    """Rows (tokens) of a tile."""
    cols: int
    """Columns of a tile: hidden units, or experts of a router."""
    warps: int
    stages: int
    """Loads that are issued ahead (software pipelining)."""


def tiles(kernel: str, shape: Sequence[int | str], default: Tiles) -> Tiles:
    """Return the tiles measured for this kernel, shape and GPU, or the default."""
    known = measured()
    return known.get(key(kernel, shape), default) if known else default


def measured() -> dict[str, Tiles]:
    """Return what was kept for this device, key → tiles. A bench may put candidates into it."""
    return _measured(_device(torch.cuda.current_device() if torch.cuda.is_available() else -1))


def key(kernel: str, shape: Sequence[int | str]) -> str:
    """Return the key of one kernel at one shape, which `tiles` looks up."""
    return " ".join([kernel, *map(str, shape)])


def keep(key: str, best: Tiles) -> None:
    """Add one choice to the file of this GPU, atomically."""
    device = _device(torch.cuda.current_device() if torch.cuda.is_available() else -1)
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _measured(device) | {key: best}
    choices = {k: asdict(v) for k, v in sorted(known.items())}
    text = json.dumps({"triton": version("triton"), "tiles": choices}, indent=1)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
    _measured.cache_clear()


@functools.cache
def _measured(device: str) -> dict[str, Tiles]:
    """Read the file of a device. It is ignored where another Triton measured, whose compiler may
    need more registers or shared memory, and where it cannot be read."""
    path = _path(device)
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text())
        if stored["triton"] != version("triton"):
            return _ignore(path, f"measured with Triton {stored['triton']}")
        return {key: Tiles(**value) for key, value in stored["tiles"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return _ignore(path, "not a file of tiles")


def _ignore(path: Path, why: str) -> dict[str, Tiles]:
    print(f"headway: {path} is ignored, {why}; default tiles are used", file=sys.stderr)
    return {}


def _path(device: str) -> Path:
    return cache_root() / "tiles" / f"{device}.json"


@functools.cache
def _device(index: int) -> str:
    """Return the GPU's name as a file name; `cpu` for −1, under the interpreter."""
    if index < 0:
        return "cpu"
    return "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(index))
