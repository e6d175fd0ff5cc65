"""The sparse layer on a GPU, beside its rivals: experts, router, the whole layer, flat MoE.

    python bench/gpu_layer.py [--quick] [--repeats 20] [--minutes 7.5] [--json] [--save]
    python bench/gpu_layer.py --tune         measures tiles for this GPU; later runs take them
    python bench/gpu_layer.py --check        errors against float64 at small sizes, on any machine

Every row is the median of forward with backward; rivals (bench/gpu_rivals.py) take turns with ours.
TFLOP/s counts the products of the definition, 3 · 2·R·(G+1)·L·F, not what is computed twice to save
memory. Errors are against float64 with 512 tokens of the same shape. Without a GPU `--check` runs
the kernels in Triton's interpreter.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--check" in sys.argv and not torch.cuda.is_available():
    os.environ["HEADWAY_TRITON"] = "interpret"  # read when the kernels are imported
from bench import common, gpu_measure
from bench.gpu_rows import (
    FLAT,
    Shape,
    expert_errors,
    expert_row,
    layer_row,
    narrow_shapes,
    router_row,
    router_shapes,
    tune_experts,
    tune_router,
)
from headway.config import UsageError
from headway.kernels.gpu import gpu


def targets(rows: list[dict]) -> list[dict]:
    """What was promised; a ratio is the worst of its shapes."""

    def worst(part: str, rival: str, key: str = "ms") -> float:
        """Smallest ratio of the fastest rival of that name to ours."""
        ratios = []
        for r in (r for r in rows if r["part"] == part):
            named = [ms for n, ms in r[key].items() if n != "headway" and n.startswith(rival)]
            if named:
                ratios.append(min(named) / r[key]["headway"])
        return min(ratios, default=float("nan"))

    wide = [r for r in rows if r["part"] == "experts" and (r["L"], r["F"]) == (256, 512)]
    memory = [
        r["peak_mib"]["headway"] / r["peak_mib"]["grouped_mm"] for r in rows if r["part"] == "layer"
    ]
    share = min((r["share_of_matmul"] for r in wide), default=float("nan"))
    goals = [
        ("experts: FlexAttention / headway", worst("experts", "FlexAttention"), 1.5, True),
        ("experts: grouped_mm / headway", worst("experts", "grouped_mm"), 1.2, True),
        ("router: naive / headway", worst("router", "naive"), 2.0, True),
        ("router: IEEE top-k / headway", worst("router", "IEEE", "forward_ms"), 1.5, True),
        ("layer: best rival / headway", worst("layer", ""), 1.3, True),
        ("experts: share of the matmul peak at L 256, F 512", share, 0.5, True),
        ("layer: peak memory / grouped_mm", max(memory, default=float("nan")), 1 / 3, False),
        ("flat MoE: grouped_mm / headway", worst("flat", "grouped_mm"), 0.95, True),
    ]
    return [common.target(*goal) for goal in goals]


def check(device: torch.device) -> list[dict]:
    """Errors at small sizes: rivals too, since a wrong rival is no rival."""
    rows = []
    for activation in ("swiglu", "gelu"):
        s = Shape(48, 2, 64, 3, 2, 128, activation)
        for name, error in expert_errors(s, device).items():
            row = {"part": "experts", "shape": str(s), "name": name, **error}
            rows.append(row)
            print(f"{row['shape']}  {name:<12} output {error['output']:.2e}  ", end="")
            print(f"worst gradient {error['gradient']:.2e}", flush=True)
    return rows


def measure(args: argparse.Namespace) -> list[dict]:
    """Every row that fits the time, the most telling first."""
    device, end = torch.device("cuda"), time.monotonic() + 60 * args.minutes
    peak, copy = gpu_measure.matmul_tflops(), gpu_measure.copy_gbs()
    print(f"{torch.cuda.get_device_name()}: {peak:.0f} TFLOP/s bf16 matmul, {copy:.0f} GB/s copy")
    rows: list[dict] = [{"part": "ceiling", "matmul_tflops": peak, "copy_gbs": copy}]
    shapes, n = narrow_shapes(args.quick), args.repeats
    todo: list[Callable[[], dict]] = []
    todo += [lambda s=s: expert_row("experts", s, device, n, peak) for s in shapes]
    todo += [lambda s=s: layer_row(s, device, n) for s in narrow_shapes(quick=True)]
    todo += [lambda s=s: router_row(s, device, n) for s in router_shapes()]
    todo += [lambda s=s: expert_row("flat", s, device, n, peak) for s in FLAT.values()]
    for i, row in enumerate(todo):
        if time.monotonic() > end:
            print(
                f"{args.minutes:g} minutes are over: {len(todo) - i} of {len(todo)} rows left out"
            )
            break
        rows.append(row())
        torch.cuda.empty_cache()
        print(line(rows[-1]), flush=True)
    return rows


def tune_all(args: argparse.Namespace) -> None:
    """Tiles of the experts for every width of the bench, then of the routers; they are kept."""
    end = time.monotonic() + 60 * args.minutes
    by_width: dict[tuple, Shape] = {}
    for s in narrow_shapes(args.quick):
        by_width.setdefault((s.L, s.F, s.activation), s)
    todo = [(s, tune_experts) for s in by_width.values()]
    todo += [(s, tune_router) for s in router_shapes()]
    for s, tune in todo:
        if time.monotonic() > end:
            print(f"{args.minutes:g} minutes are over; call it again with more --minutes")
            return
        for kernel, found in tune(s, torch.device("cuda")).items():
            print(f"{s}  {kernel}: {found}", flush=True)


def line(row: dict) -> str:
    """One row for people: milliseconds by name, the fastest first, and what else is known."""
    cells = [f"{row['part']:<8}{row['shape']:<34}"]
    cells += [f"{n} {ms:.2f}" for n, ms in sorted(row["ms"].items(), key=lambda item: item[1])]
    if "tflops" in row:
        error = row["error"]["headway"]
        cells += [
            f"{row['tflops']['headway']:.0f} TFLOP/s ({row['share_of_matmul']:.0%} of matmul)"
        ]
        cells += [f"error {error['output']:.1e}, gradient {error['gradient']:.1e}"]
        cells += [f"keeps {row['kept_bytes']['headway'] / 2**20:.0f} MiB"]
    if "forward_ms" in row:
        cells += [f"forward: {n} {ms:.2f}" for n, ms in row["forward_ms"].items()]
        cells += [f"chooses as float64 {row['same_choice']:.3%}"]
    if "peak_mib" in row:
        cells += ["peak MiB " + ", ".join(f"{n} {m:.0f}" for n, m in row["peak_mib"].items())]
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the middle shapes only")
    parser.add_argument("--check", action="store_true", help="errors only, on any machine")
    parser.add_argument("--tune", action="store_true", help="measure tile sizes, keep them, stop")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=7.5, help="start no row after this")
    common.add_options(parser, data=False)
    args = parser.parse_args()
    if args.repeats < 1 or args.minutes <= 0:
        got = f"{args.repeats} and {args.minutes:g}"
        raise UsageError(f"--repeats and --minutes must be at least 1 and above 0; got {got}")
    if args.check:
        if not gpu().device:
            raise UsageError(f"no GPU kernels here, interpreted or not: {gpu().why}")
        rows = check(torch.device(gpu().device))
        common.report("gpu_layer_check", rows, check_targets(rows), args)
        return
    if gpu().device != "cuda":
        raise UsageError(f"no GPU kernels here: {gpu().why}; --check runs them interpreted, tiny")
    if args.tune:
        tune_all(args)
        return
    rows = measure(args)
    common.report("gpu_layer", rows, targets(rows), args)


def check_targets(rows: list[dict]) -> list[dict]:
    """The bounds of DESIGN for bfloat16 experts."""
    own = [r for r in rows if r["name"] == "headway"]
    return [
        common.target("output error", max(r["output"] for r in own), 3e-3, False),
        common.target("gradient error", max(r["gradient"] for r in own), 5e-3, False),
    ]


if __name__ == "__main__":
    common.run(main)
