"""Which tiles are fastest on this GPU: each kernel of the experts and the router, one at a time.

First all candidates are compiled and launched once at a tiny size, in as many child processes as
there are cores: what does not fit, spills, or ends its process drops out there. Then the rest are
timed by whole passes, which differ in nothing but the one kernel's tiles.

    python bench/gpu_tiles.py --keep DIR     keeps the fastest of DIR/tiles.json for this machine
"""

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import gpu_measure, gpu_rows
from bench.gpu_rows import BASE, FLAT, Shape
from headway.config import UsageError, n_inputs
from headway.kernels.gpu import experts_narrow, experts_wide, tune
from headway.kernels.gpu.tune import Tiles
from headway.kernels.paths import ExpertInputs

if TYPE_CHECKING:
    from bench.gpu_stages import Record

NARROW = {
    ("forward", 64): [(64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)],
    ("forward", 128): [(64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)],
    ("forward", 256): [(64, 16, 4), (64, 32, 8), (128, 16, 8), (128, 32, 8)],
    ("backward_rows", 64): [(64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 16, 8)],
    ("backward_rows", 128): [(64, 16, 4), (64, 32, 4), (64, 32, 8), (128, 32, 8)],
    ("backward_weights", 64): [(64, 16, 4), (64, 32, 4), (64, 32, 8), (128, 32, 8)],
    ("backward_weights", 128): [(64, 16, 4), (64, 32, 4), (64, 32, 8), (128, 32, 8)],
}
"""Kernel and width → rows, columns and warps that put nothing on the stack on Hopper (compiled with
Triton 3.6)."""

WIDE = {
    "hidden": [(128, 64, 8), (64, 64, 4), (128, 128, 8)],
    "rows": [(128, 128, 8), (128, 128, 4), (64, 128, 4), (128, 256, 8)],
    "gradients": [(128, 64, 8), (64, 64, 4), (128, 32, 8)],
    "weights": [(128, 128, 8), (128, 128, 4), (64, 128, 4), (128, 256, 8)],
}

ROUTER = {
    "route": [(64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)],
    "route_columns": [(64, 32, 4), (64, 32, 8), (64, 64, 8)],
    "route_slots": [(64, 32, 4), (64, 64, 4), (128, 64, 8)],
    "route_dx": [(64, 32, 4), (64, 32, 8), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8)],
    "route_dw": [(64, 32, 4), (64, 32, 8), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8)],
}
STAGES = (2, 3)


@dataclass(frozen=True)
class Case:
    """One kernel at one width with some tiles."""

    kernel: str
    """As in the file of tiles: `experts_forward`, `route_dx`, …"""
    L: int
    tiles: Tiles

    def key(self, s: Shape) -> str:
        """Of the file of tiles."""
        if self.kernel.startswith("experts"):
            return tune.key(self.kernel, (s.L, n_inputs(s.activation), s.F, 2))
        return tune.key(self.kernel, (s.L, s.E, 2))


def cases(shapes: list[Shape], dry: bool) -> Iterator[Case]:
    """What is tried."""
    for s in shapes:
        grids: dict[str, list[tuple[int, int, int]]] = {}
        for name in experts_narrow.KERNELS:
            known = NARROW.get((name, s.L), [])
            grids[f"experts_{name}"] = [(16, 16, 4), (16, 32, 4)] if dry else known
        if s.L > 128 or dry:
            grids |= {f"experts_wide_{name}": grid for name, grid in WIDE.items()}
        if s.L <= 256 and s.H > 1:
            grids |= ROUTER
        for kernel, grid in grids.items():
            if kernel == "route_columns" and s.E <= 128:
                continue  # not launched
            for cut in grid[:1] if dry else grid:
                for stages in STAGES[:1] if dry else STAGES:
                    yield Case(kernel, s.L, Tiles(*cut, stages))


def passes(s: Shape, device: torch.device, n_experts: int) -> dict[str, Callable[[], object]]:
    """Calls that launch the kernels, by the start of a kernel's name; the longest comes first. The
    experts' are given `n_experts` of the experts."""
    router = gpu_rows.router_pass(s, device)
    s = replace(s, E=n_experts)
    (x, gate, *weights), index, d_out = gpu_rows.inputs(s, device)
    x_NL, do_NL = x.detach().flatten(0, 1), d_out.flatten(0, 1)
    from headway.kernels.gpu.permute import sort_rows

    narrow = [w.detach().bfloat16() for w in weights]  # the cast is not part of a kernel
    gate_NK, rows = gate.detach().flatten(0, 1), sort_rows(index, s.E)
    given = ExpertInputs(x_NL, gate_NK, narrow[0], narrow[1], *rows, s.activation)
    empty = x_NL.new_empty(0, 2 * s.F)
    found: dict[str, Callable[[], object]] = {
        "experts_wide_hidden": lambda: experts_wide.forward(given, False),
        "experts_wide_rows": lambda: experts_wide.forward(given, False),
        "experts_wide": lambda: experts_wide.backward(do_NL, given, empty),
        "route": router,
    }
    if s.L <= 256:
        found["experts_forward"] = lambda: experts_narrow.forward(given)
        found["experts_backward"] = lambda: experts_narrow.backward(do_NL, given)
    return found


def call_of(kernel: str, calls: dict[str, Callable[[], object]]) -> Callable[[], object]:
    """The pass that launches a kernel."""
    return next(call for name, call in calls.items() if kernel.startswith(name))


def compile_some(part: int, parts: int, shapes: list[Shape], dry: bool, skip: int) -> None:
    """Every `parts`-th case from `part` on, without the first `skip` of them: one line each,
    before it is launched and after."""
    import triton

    seen: dict[str, Any] = {}
    plain = triton.runtime.jit.JITFunction.run

    def run(self, *args, **kwargs):
        kernel = plain(self, *args, **kwargs)
        seen[self.__name__] = kernel
        return kernel

    if not dry:
        triton.runtime.jit.JITFunction.run = run
    device = torch.device("cpu" if dry else "cuda")
    small = {s.L: replace(s, T=64 if not dry else 8) for s in shapes}
    calls = {L: passes(s, device, min(s.E, 16)) for L, s in small.items()}
    for i, case in list(enumerate(cases(shapes, dry)))[part::parts][skip:]:
        print(json.dumps({"case": i, "error": "its process ended"}), flush=True)
        seen.clear()
        known = tune.measured()
        known[case.key(small[case.L])] = case.tiles
        row: dict[str, Any] = {"case": i}
        try:
            call_of(case.kernel, calls[case.L])()
            if not dry:
                torch.cuda.synchronize()
                kernel = seen[KERNEL_NAMES.get(case.kernel, case.kernel)]
                row |= {"registers": kernel.n_regs, "spills": kernel.n_spills}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        known.pop(case.key(small[case.L]))
        print(json.dumps(row), flush=True)


KERNEL_NAMES = {
    "experts_wide_hidden": "wide_hidden",
    "experts_wide_rows": "wide_rows",
    "experts_wide_gradients": "wide_gradients",
    "experts_wide_weights": "wide_weights",
    "route": "_choose",
    "route_columns": "_columns",
    "route_slots": "_slots",
    "route_dx": "_d_tokens",
    "route_dw": "_d_weights",
}


def compiled(record: "Record", n_cases: int) -> dict[int, dict]:
    """Case → what its compilation told. A child that ends on the way is started again behind the
    case that ended it."""
    parts = 1 if record.dry else max(1, min(14, (os.cpu_count() or 1) - 1))
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve())]
    command += ["--dry"] if record.dry else []
    found: dict[int, dict] = {}

    def start(part: int, skip: int) -> subprocess.Popen:
        words = [*command, "--compile", str(part), str(parts), str(skip)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)

    running = {part: start(part, 0) for part in range(parts)}
    for part in range(parts):
        while True:
            out, _ = running[part].communicate()
            for line in out.splitlines():
                row = json.loads(line)
                found[row["case"]] = row  # the later line of a case replaces the first
            done = sum(i in found for i in range(part, n_cases, parts))
            if running[part].returncode == 0 or done == len(range(part, n_cases, parts)):
                break
            running[part] = start(part, done)
    return found


def shapes_of(dry: bool) -> list[Shape]:
    if dry:
        return [Shape(6, 2, 16, 3, 2, 16)]
    return [BASE[512], FLAT["OLMoE"], BASE[256], BASE[128], BASE[64]]


def measure(record: "Record") -> None:
    """A row for every kernel and width: milliseconds of a pass by tiles, and the fastest."""
    shapes = shapes_of(record.dry)
    todo = list(cases(shapes, record.dry))
    told = compiled(record, len(todo))
    for s in shapes:
        calls = passes(s, record.device, s.E)
        for kernel in dict.fromkeys(c.kernel for c in todo if c.L == s.L):
            mine = [(i, c) for i, c in enumerate(todo) if (c.kernel, c.L) == (kernel, s.L)]
            record.attempt(
                f"{kernel} L {s.L}",
                functools.partial(
                    _row, s, mine, told, call_of(kernel, calls), min(5, record.repeats)
                ),
            )


def _row(
    s: Shape,
    mine: list[tuple[int, Case]],
    told: dict[int, dict],
    call: Callable[[], object],
    repeats: int,
) -> dict:
    known, tried = tune.measured(), []
    default = statistics.median(gpu_measure.times({"": call}, repeats)[""])
    for i, case in mine:
        facts = told.get(i, {"error": "not compiled"})
        row = asdict(case.tiles) | {k: v for k, v in facts.items() if k != "case"}
        if "error" not in facts and not facts.get("spills"):
            known[case.key(s)] = case.tiles
            try:
                row["ms"] = statistics.median(gpu_measure.times({"": call}, repeats, 2)[""])
            finally:
                known.pop(case.key(s))
        tried.append(row)
    timed = [row for row in tried if "ms" in row]
    best = min(timed, key=lambda row: row["ms"], default=None)
    key = mine[0][1].key(s)
    return {"key": key, "default_ms": default, "best": best, "tried": tried}


def line(row: dict) -> str:
    """For people: the default, then the five fastest."""
    timed = sorted((r for r in row["tried"] if "ms" in r), key=lambda r: r["ms"])
    cells = [
        f"{r['rows']}x{r['cols']} w{r['warps']} s{r['stages']} {r['ms']:.3f}" for r in timed[:5]
    ]
    left = len(row["tried"]) - len(timed)
    return (
        f"{row['what']}: default {row['default_ms']:.3f} ms; " + ", ".join(cells) + f"; {left} out"
    )


def keep(folder: Path) -> None:
    """Writes the fastest tiles to this machine's file of tiles."""
    path = folder / "tiles.json"
    if not path.is_file():
        raise UsageError(f"--keep {folder}: there is no {path.name}; run bench/gpu_day.py first")
    for row in json.loads(path.read_text())["rows"]:
        if row.get("best"):
            fields = {k: row["best"][k] for k in ("rows", "cols", "warps", "stages")}
            tune.keep(row["key"], Tiles(**fields))
            print(f"{row['key']}: {fields}")


if __name__ == "__main__":
    if "--compile" in sys.argv:
        at = sys.argv.index("--compile")
        part, parts, skip = map(int, sys.argv[at + 1 : at + 4])
        dry = "--dry" in sys.argv
        compile_some(part, parts, shapes_of(dry), dry, skip)
    elif "--keep" in sys.argv:
        keep(Path(sys.argv[sys.argv.index("--keep") + 1]))
    else:
        print(__doc__)
