"""The stages of bench/gpu_day.py: what each measures, at full and at toy size, and its lines for
people. A stage adds rows as they come; a row that fails says so and the next one is tried."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bench import common, gpu_measure, gpu_profile, gpu_rows, gpu_tiles, gpu_user, gpu_whole
from bench.gpu_rows import BASE, FLAT, ROUTERS, Shape
from headway.config import UsageError
from headway.kernels.gpu import gpu_kernels
from headway.report.provenance import provenance

TOY = Shape(6, 2, 16, 3, 2, 16)
QWEN = "Qwen3-30B-A3B"


class Record:
    """What one stage has found so far, on disk after every row."""

    def __init__(self, folder: Path, name: str, dry: bool):
        self.folder, self.name, self.dry = folder, name, dry
        self.device = torch.device(gpu_kernels().device)
        self.repeats = 1 if dry else 10
        self.rows: list[dict] = []

    def add(self, row: dict) -> None:
        self.rows += common.stamped([row])  # a later call may resume on another machine
        write(self.folder, self.name, {"rows": self.rows, "done": False})

    def attempt(self, what: str, measure: Callable[[], dict]) -> None:
        """A row, or why there is none."""
        start = time.perf_counter()
        try:
            row = measure()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"[:300]}
        self.add({"what": what, "seconds": time.perf_counter() - start} | row)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def machine(record: Record) -> None:
    """The ceilings: what everything else is a share of."""
    record.attempt("ceiling", lambda: ceilings(record))


def ceilings(record: Record) -> dict:
    size, mib = (64, 1) if record.dry else (8192, 1024)
    name = "a CPU, interpreted"
    if record.device.type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "device": name,
        "matmul_tflops": gpu_measure.matmul_tflops(record.device, size),
        "copy_gbs": gpu_measure.copy_gbs(record.device, mib),
    }


def tests(record: Record) -> None:
    """The kernels' tests on this GPU, compiled; each failure is a row."""
    report = record.folder / "tests.xml"
    where = ["tests/kernels/gpu/test_blocks.py"] if record.dry else ["tests/kernels/gpu"]
    marker = "not gpu and not slow" if record.dry else "gpu"
    options = ["-v", "-m", marker, f"--junitxml={report}", "--tb=short", "-p", "no:cacheprovider"]
    if not record.dry and _has("xdist"):
        options += ["-n", "12"]
    command = [sys.executable, "-m", "pytest", *options, *where]
    done = subprocess.run(command, cwd=common.ROOT, check=False)
    cases = list(xml.parse(report).getroot().iter("testcase"))
    failures = [(c, problem) for c in cases for problem in (c.find("failure"), c.find("error"))]
    for case, problem in failures:
        if problem is not None:
            text = (problem.text or "").strip().splitlines()
            record.add(
                {
                    "what": f"{case.get('classname')}::{case.get('name')}",
                    "error": str(problem.get("message"))[:300],
                    "tail": text[-12:],
                }
            )
    skipped = sum(c.find("skipped") is not None for c in cases)
    failed = len(record.rows)
    record.add(
        {
            "what": "tests",
            "passed": len(cases) - skipped - failed,
            "failed": failed,
            "skipped": skipped,
            "exit": done.returncode,
        }
    )


def check(record: Record) -> None:
    """Errors of ours and of every rival against float64: a race against a wrong one is none."""
    small, larger = Shape(48, 2, 64, 3, 2, 128), Shape(512, 8, 128, 16, 4, 256)
    for activation in ("swiglu", "gelu"):
        shapes = (replace(TOY, T=24, F=32),) if record.dry else (small, larger)
        for s in (replace(s, activation=activation) for s in shapes):
            for name, error in gpu_rows.expert_errors(s, record.device).items():
                record.add({"what": f"{name}, {s}", "rival": name, **error})


def profile(record: Record) -> None:
    """Where the time of a whole sparse layer goes, kernel by kernel, balance loss included."""
    if record.dry:
        shapes = [(TOY, 0.01)]
    else:
        shapes = [(s, 0.01) for s in (BASE[128], BASE[256], FLAT["OLMoE"], BASE[512], BASE[64])]
        shapes += [(replace(BASE[256], F=512), 0.01), (replace(BASE[128], E=1024), 0.01)]
        shapes += [(BASE[128], 0.0)]
    for s, aux in shapes:
        record.attempt(f"{s} aux {aux:g}", lambda s=s, aux=aux: gpu_profile.layer(s, aux, record))


def tiles(record: Record) -> None:
    """A fixed list of tiles for each kernel of the experts, each timed alone."""
    gpu_tiles.measure(record)


def experts(record: Record) -> None:
    """Experts beside their rivals, forward with backward; those that torch.compile makes last."""
    if record.dry:
        todo = [("experts", TOY, False)]
    else:
        todo = [("experts", BASE[L], False) for L in (128, 64, 256, 512)]
        todo += [("flat", FLAT["OLMoE"], False)]
        todo += [("experts", replace(BASE[128], E=64), False), ("flat", FLAT[QWEN], False)]
        todo += [("experts", replace(BASE[128], E=64, activation="gelu"), True)]
        todo += [("experts", replace(BASE[256], E=64), True)]
    for part, s, compiled in todo:
        record.attempt(
            f"{s}, compiled rivals too" if compiled else str(s),
            lambda p=part, s=s, c=compiled: gpu_rows.expert_row(p, s, record, c),
        )


def router(record: Record) -> None:
    """The router beside its rivals, with and without the gradient of a balance loss."""
    shapes = [TOY] if record.dry else ROUTERS
    for s in shapes:
        record.attempt(str(s), lambda s=s: gpu_rows.router_row(s, record))


def layer(record: Record) -> None:
    """Whole sparse layers: time and peak memory."""
    shapes = [TOY] if record.dry else BASE.values()
    for s in shapes:
        record.attempt(str(s), lambda s=s: gpu_rows.layer_row(s, record))


def step(record: Record) -> None:
    """A whole training step beside Transformers' of the same size: tokens/s, MFU, memory."""
    from bench import gpu_step

    known = load(record.folder, "machine")["rows"]
    known = [row["matmul_tflops"] for row in known if "matmul_tflops" in row]
    peak = known[0] if known else gpu_measure.matmul_tflops(record.device)
    for name, (model, build) in gpu_step.rivals(record).items():
        record.attempt(name, lambda m=model, b=build: gpu_step.row(m, b, record, peak))


def user(record: Record) -> None:
    """Training, resuming, evaluating, sampling and the engine, as a user calls them."""
    gpu_user.measure(record)


def whole(record: Record) -> None:
    """Where the time of a training step of `small` goes: host, device, optimisers."""
    gpu_whole.measure(record)


def sanitizer(record: Record) -> None:
    """NVIDIA's memory and race checkers over router, sort and experts at a small size."""
    path = os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
    tool = shutil.which("compute-sanitizer", path=path)
    if tool and not record.dry:  # compiles what the checkers then find in Triton's cache
        with contextlib.suppress(subprocess.TimeoutExpired):
            warm = [sys.executable, "-W", "ignore", str(Path(gpu_profile.__file__).resolve())]
            subprocess.run(warm, timeout=60, check=False)
    for kind in ("memcheck",) if record.dry else ("memcheck", "racecheck"):
        record.attempt(kind, lambda k=kind: _sanitize(tool, k, record))


def _sanitize(tool: str | None, kind: str, record: Record) -> dict:
    program = [sys.executable, "-W", "ignore", str(Path(gpu_profile.__file__).resolve())]
    if record.dry:
        program.append("--dry")
    elif tool is None:
        raise FileNotFoundError("compute-sanitizer is not on the PATH")
    else:
        program = [tool, "--tool", kind, "--error-exitcode", "9", *program]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=100, env=environment, check=False
    )
    last = (done.stdout + done.stderr).strip().splitlines()[-6:]
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' | '.join(last)}")
    return {"exit": 0, "last": last}


STAGES: dict[str, Callable[[Record], None]] = {
    stage.__name__: stage
    for stage in (
        machine,
        tests,
        check,
        user,
        whole,
        step,
        layer,
        router,
        profile,
        experts,
        tiles,
        sanitizer,
    )
}
SECONDS = {
    "machine": 60,
    "tests": 200,
    "check": 90,
    "user": 240,
    "whole": 150,
    "step": 240,
    "layer": 60,
    "router": 180,
    "profile": 90,
    "experts": 150,
    "tiles": 160,
    "sanitizer": 270,
}
"""At most, of each stage."""


def run(name: str, folder: Path, dry: bool) -> None:
    """One stage, in this process."""
    record = Record(folder, name, dry)
    STAGES[name](record)
    write(folder, name, {"rows": record.rows, "done": True, **provenance()})


def load(folder: Path, name: str) -> dict:
    """What a stage has written: `rows`, `done`, and `error` where it ended early."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": [], "done": False}


def write(folder: Path, name: str, document: dict) -> None:
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1))
    temporary.replace(path)


def check_device(dry: bool) -> None:
    """Raises UsageError where the kernels cannot run."""
    wanted = "cpu" if dry else "cuda"
    if gpu_kernels().device != wanted:
        raise UsageError(
            f"no GPU kernels here: {gpu_kernels().why}; --dry runs every stage on a CPU, tiny"
        )


def lines(name: str, rows: list[dict]) -> Iterator[str]:
    """Rows for people."""
    for row in rows:
        if "error" in row and "output" not in row:
            yield f"{row['what']}: FAILED {row['error'][:200]}"
            yield from ("    " + t for t in row.get("tail", [])[-3:])
        elif name == "machine":
            yield (
                f"{row['device']}: {row['matmul_tflops']:.3g} TFLOP/s bf16 matmul, "
                f"{row['copy_gbs']:.3g} GB/s copy"
            )
        elif name == "tests":
            yield f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
        elif name == "check":
            yield f"{row['what']}: output {row['output']:.1e}, gradient {row['gradient']:.1e}"
        elif name == "profile":
            yield from gpu_profile.lines(row)
        elif name == "tiles":
            yield gpu_tiles.line(row)
        elif "ms" in row:
            yield gpu_rows.line(row)
        else:
            yield (
                row["what"]
                + ": "
                + ", ".join(f"{k} {_short(v)}" for k, v in row.items() if not isinstance(v, list))
            )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:160]


def targets(rows: list[dict]) -> list[dict]:
    """What was promised; a ratio is the worst of its shapes, NaN where nothing was measured."""

    def worst(part: str, rival: str, key: str = "ms") -> float:
        """Smallest ratio of the fastest rival of that name to ours."""
        ratios = []
        for r in (r for r in rows if r.get("part") == part and key in r):
            named = [ms for n, ms in r[key].items() if n != "headway" and n.startswith(rival)]
            if named and "headway" in r[key]:
                ratios.append(min(named) / r[key]["headway"])
        return min(ratios, default=float("nan"))

    failed = [r for r in rows if r["stage"] == "tests" and "failed" in r]
    memory = [
        r["peak_mib"]["headway"] / r["peak_mib"]["grouped_mm"]
        for r in rows
        if r.get("part") == "layer" and r.get("peak_mib", {}).get("grouped_mm")
    ]
    own = [r for r in rows if r["stage"] == "check" and r.get("rival") == "headway"]
    goals = [
        ("tests that failed", sum(r["failed"] for r in failed) if failed else float("nan"), 0),
        ("error of the output", max((r["output"] for r in own), default=float("nan")), 3e-3),
        ("error of a gradient", max((r["gradient"] for r in own), default=float("nan")), 5e-3),
        ("layer: peak memory / grouped_mm", max(memory, default=float("nan")), 1 / 3),
    ]
    ratios = [
        ("experts: FlexAttention / headway", worst("experts", "FlexAttention"), 1.5),
        ("experts: grouped_mm / headway", worst("experts", "grouped_mm"), 1.2),
        ("experts: ScatterMoE / headway", worst("experts", "ScatterMoE"), 1.2),
        ("router: naive / headway", worst("router", "naive"), 2.0),
        ("router: naive / headway, balance loss", worst("router", "naive", "balance_ms"), 1.0),
        ("router: IEEE top-k / headway", worst("router", "IEEE", "forward_ms"), 1.5),
        ("layer: best rival / headway", worst("layer", ""), 1.3),
        ("flat MoE: grouped_mm / headway", worst("flat", "grouped_mm"), 0.95),
    ]
    return [
        *(common.target(name, value, bound, False) for name, value, bound in goals),
        *(common.target(name, value, bound, True) for name, value, bound in ratios),
    ]


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
