"""Tile sizes: a default for every shape, or what was measured on this GPU and kept on disk.

A run never measures by itself: the first step of a job, a captured graph and N ranks would all
choose differently. `bench/gpu_layer.py --tune` measures, and every later process on a GPU of that
name reads the file once.
"""

import functools
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel is cut."""

    rows: int
    """Rows (tokens) of a tile."""
    cols: int
    """Columns of a tile: hidden units, or experts of a router."""
    warps: int
    stages: int
    """Loads under way at once."""
    hoist: bool = True
    """Of the experts: what does not change in a loop is computed before it. Hopper addresses 16
    columns of a tile in shared memory by 64 bits; those of two tiles of 512 take 128 registers."""


def tiles(kernel: str, shape: Sequence[int | str], default: Tiles) -> Tiles:
    """The tiles measured for this kernel, shape and GPU, or the default."""
    return _measured(_device()).get(_key(kernel, shape), default)


def tune(
    kernel: str,
    shape: Sequence[int | str],
    candidates: Sequence[Tiles],
    run: Callable[[], object],
    repeats: int = 10,
) -> Tiles:
    """Times `run`, which launches the kernel, with every candidate; keeps the fastest on disk and
    returns it.

    A candidate that does not fit the GPU (shared memory, registers) is passed over. Raises:
    RuntimeError where none fits.
    """
    known, key, times = _measured(_device()), _key(kernel, shape), {}
    before = known.get(key)
    try:
        for candidate in candidates:
            known[key] = candidate  # `tiles` finds it, the disk does not
            try:
                run()
            except Exception as error:
                if type(error).__name__ not in ("OutOfResources", "PTXASError", "CompilationError"):
                    raise
                continue
            times[candidate] = statistics.median(_time(run, repeats))
    finally:
        known.pop(key)
        if before is not None:
            known[key] = before
    if not times:
        raise RuntimeError(f"no tiles of {kernel} fit this GPU for {key}")
    best = min(times, key=times.__getitem__)
    _keep(key, best)
    return best


def _time(run: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each repetition."""
    pairs = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def _keep(key: str, best: Tiles) -> None:
    """Adds one choice to the file of this GPU, whole or not at all."""
    path = _path(_device())
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _measured(_device()) | {key: best}
    text = json.dumps({k: asdict(v) for k, v in sorted(known.items())}, indent=1)
    made = path.with_suffix(f".{os.getpid()}")
    made.write_text(text)
    made.replace(path)
    _measured.cache_clear()


@functools.cache
def _measured(device: str) -> dict[str, Tiles]:
    path = _path(device)
    if not path.is_file():
        return {}
    return {key: Tiles(**value) for key, value in json.loads(path.read_text()).items()}


def _key(kernel: str, shape: Sequence[int | str]) -> str:
    return " ".join([kernel, *map(str, shape)])


def _path(device: str) -> Path:
    root = Path(os.environ.get("HEADWAY_CACHE") or Path.home() / ".cache" / "headway").expanduser()
    return root / "tiles" / f"{device}.json"


def _device() -> str:
    """The GPU's name as a file name; `cpu` under the interpreter."""
    if not torch.cuda.is_available():
        return "cpu"
    return "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name())
