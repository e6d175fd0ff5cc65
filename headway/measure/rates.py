"""`headway doctor --measure FILE`: measured rates of this machine, for `headway plan --machine`.

Every rate is the best of several repetitions, a collective's time their median. Under torchrun all
ranks measure at the same time, as in training, rank 0 writes its own numbers, and the network is
measured too."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headway.config import MoEConfig, UsageError
from headway.kernels.attention import attention
from headway.kernels.precision import native_bfloat16
from headway.measure.links import elapsed, measure_curves, two_numbers
from headway.model.mixers.attention import mean_keys
from headway.model.moe import Experts
from headway.model.router import Router
from headway.plan.link import Curve
from headway.report.provenance import provenance

Show = Callable[[str], None]
Note = Callable[[str, float, str, str], None]


def measure_machine(
    path: Path, show: Show = lambda text: None, seconds: float = 0.5
) -> dict[str, Any]:
    """Measure, write the machine file and return its content; `seconds` per number. `show` is
    called with a line after each number, on rank 0 only. Raises UsageError where the file's folder
    is missing or no rendezvous is found, before measuring."""
    if not path.parent.is_dir():
        raise UsageError(f"--measure {path}: there is no folder {path.parent}; make it first")
    cuda = torch.cuda.is_available()
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    ranks, local = (int(os.environ.get(n, "1")) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1:
        _rendezvous("nccl" if cuda else "gloo")
    show = show if rank == 0 else lambda text: None
    try:
        content = _measure_all(device, ranks, local, show, seconds)
    finally:
        if ranks > 1:
            dist.destroy_process_group()
    if rank == 0:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(path)
    return content


def _measure_all(
    device: torch.device, ranks: int, local: int, show: Show, seconds: float
) -> dict[str, Any]:
    origin = provenance()
    machine = origin["machine"]
    big = device.type == "cuda"
    details: dict[str, Any] = {}

    def note(key: str, value: float, unit: str, what: str) -> None:
        details[key] = {"value": value, "unit": unit, "what": what}
        show(f"{key:<22} {value:>12,.4g} {unit:<8} {what}")

    measured = measure_rates(device, seconds, note)
    if big:
        measured["memory"] = float(torch.cuda.mem_get_info(device)[0])
        note("memory", measured["memory"] / 1e9, "GB", "free on the device")
    elif machine["memory_gib"]:
        measured["memory"] = machine["memory_gib"] * 2**30 / local
        note("memory", measured["memory"] / 1e9, "GB", f"of the machine / {local} processes")
    curves: list[Curve] = []
    if ranks > 1:
        sizes = [1 << n for n in ((12, 20, 24, 28) if big else (12, 18, 20, 22, 23))]
        repeats = max(3, min(50, int(50 * seconds)))
        inside = ranks == local
        curves = measure_curves(device, ranks, inside, sizes, repeats, overlap_cost=inside)
        bandwidth, latency = two_numbers(curves[0])
        measured |= {"intra_node" if inside else "inter_node": bandwidth, "latency": latency}
        what = f"{sizes[0]:,} to {sizes[-1]:,} bytes leave each of {ranks} ranks"
        note("all-to-all", bandwidth / 1e9, "GB/s", what)
        note("latency", latency * 1e6, "µs", "per message")
        n_bytes, s = curves[2].points[-1]
        note("all-reduce", n_bytes / s / 1e9, "GB/s", f"{n_bytes:,} bytes leave each rank")
        if inside:
            n_bytes, s = curves[3].points[-1]
            note("beside work", s * 1e6, "µs", f"added by an all-to-all of {n_bytes:,.0f} bytes")
    return {
        "name": machine["gpu"] if big else f"{machine['cpu']}, {torch.get_num_threads()} threads",
        "based_on": _nearest(machine["gpu"]) if big else "cpu",
        "dtype": _name(_dtype(device)),
        "ranks": ranks,
        "measured": measured,
        "curves": [asdict(curve) for curve in curves],
        "details": details,
        **origin,
    }


def measure_rates(
    device: torch.device,
    seconds: float,
    note: Note = lambda key, value, unit, what: None,
    wide: int = 0,
) -> dict[str, float]:
    """Return the rates of one process: fields of `plan.machine.Machine`. `note` gets each number
    with its unit and shape; `wide` is the size of the square matmul, 0 the default."""
    dtype = _dtype(device)
    big = device.type == "cuda"
    wide, rows = wide or (8192 if big else 2048), 16384 if big else 2048
    measured: dict[str, float] = {}
    for kind in dict.fromkeys((dtype, torch.float32)):
        large = matmul_flops(device, kind, wide, wide, wide, seconds)
        small = matmul_flops(device, kind, rows, 256, 1024, seconds)
        peak = max(large, small)  # on a CPU the small one may be the faster: it stays in the cache
        measured["peak" if kind == torch.bfloat16 else "peak_float32"] = peak
        if kind == dtype:
            measured["efficiency"], measured["narrow_efficiency"] = large / peak, small / peak
        note(f"matmul {_name(kind)}", large / 1e9, "GFLOP/s", f"{wide}³")
        note(f"narrow {_name(kind)}", small / 1e9, "GFLOP/s", f"[{rows}, 256] × [256, 1024]")
    peak = measured["peak" if dtype == torch.bfloat16 else "peak_float32"]
    for part, measure in (("experts", experts_flops), ("attention", attention_flops)):
        rate, what = measure(device, dtype, seconds)
        measured[f"{part}_efficiency"] = rate / peak
        note(f"{part} {_name(dtype)}", rate / 1e9, "GFLOP/s", what)
    n = 1 << (30 if big else 27)
    measured["memory_bandwidth"] = copy_bandwidth(device, n, seconds)
    note("memory copy", measured["memory_bandwidth"] / 1e9, "GB/s", f"{n >> 20} MiB, both ways")
    speed, what = rows_bandwidth(device, dtype, seconds)
    measured["rows_efficiency"] = min(speed / measured["memory_bandwidth"], 1.0)
    note("rows", speed / 1e9, "GB/s", what)
    return measured


def _dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the matmuls that `run.dtype=auto` takes."""
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the shortest repetition within `seconds`, of at least two, after a warm-up."""
    times: list[float] = []
    end = 0.0
    while len(times) < 3 or time.perf_counter() < end:
        times.append(elapsed(run, device))
        end = end or time.perf_counter() + seconds
    return min(times[1:])


def matmul_flops(
    device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int, seconds: float
) -> float:
    """Return the FLOP/s of `[rows, inner] × [inner, columns]`."""
    a = torch.ones(rows, inner, device=device, dtype=dtype)
    b = torch.ones(inner, columns, device=device, dtype=dtype)
    return 2 * rows * inner * columns / best(lambda: a @ b, device, seconds)


def copy_bandwidth(device: torch.device, n_bytes: int, seconds: float) -> float:
    """Return the bytes/s of a copy, read and written bytes together."""
    a = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)  # zeros touches the pages; empty would fault in the first copy
    return 2 * n_bytes / best(lambda: b.copy_(a), device, seconds)


def experts_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[float, str]:
    """Return the FLOP/s of the experts, forward and backward, and the shape as text."""
    T, H, L, E, K, F = (16384, 8, 256, 64, 8, 512) if device.type == "cuda" else _SMALL_EXPERTS
    torch.manual_seed(0)
    with device:
        config = MoEConfig(n_heads=H, n_experts=E, top_k=K, d_expert=F)
        layer, router = Experts(H * L, config), Router(H * L, config)
    for p in (*layer.parameters(), *router.parameters()):
        torch.nn.init.normal_(p, std=0.02)
    x_THL = torch.randn(T, H, L, device=device).to(dtype).requires_grad_()
    with torch.no_grad():
        route = router(x_THL)
    route = route._replace(gate_THK=route.gate_THK.detach().requires_grad_())
    upstream = torch.ones_like(x_THL)

    def step() -> None:
        layer(x_THL, route).backward(upstream)

    flops = 3 * 2 * T * H * K * 3 * F * L
    what = f"T {T}, H {H}, L {L}, E {E}, K {K}, F {F}, SwiGLU, forward and backward"
    return flops / best(step, device, seconds), what


_SMALL_EXPERTS = (1024, 4, 64, 16, 4, 128)


def attention_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[float, str]:
    """Return the FLOP/s of attention on causal pairs, forward and backward, and the shape."""
    B, S, N, d = (4, 4096, 16, 128) if device.type == "cuda" else (4, 256, 4, 64)
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, S, N, d, device=device).to(dtype).requires_grad_() for _ in range(3))
    upstream = torch.ones_like(q)

    def step() -> None:
        attention(q, k, v).backward(upstream)

    flops = 3 * 4 * B * N * d * S * mean_keys(S, 0)
    what = f"B {B}, S {S}, N {N}, d {d}, forward and backward"
    return flops / best(step, device, seconds), what


def rows_bandwidth(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[float, str]:
    """Return the bytes/s of the copies around an exchange, counted as in `plan.layer`: permuted
    tokens gathered into the order of their tokens, weighted and summed in float32, with gradients;
    and the shape as text."""
    T, K, L = (16384, 8, 2048) if device.type == "cuda" else (2048, 4, 192)
    torch.manual_seed(0)
    y_RL = torch.randn(T * K, L, device=device).to(dtype).requires_grad_()
    gate_TK = torch.rand(T, K, device=device).requires_grad_()
    row_TK = torch.randperm(T * K, device=device).view(T, K)
    upstream = torch.ones(T, L, device=device, dtype=dtype)

    def step() -> None:
        y_TKL = torch.cat([y_RL, y_RL.new_zeros(1, L)])[row_TK].float()
        (gate_TK.unsqueeze(-1) * y_TKL).sum(1).to(dtype).backward(upstream)

    n_bytes = T * K * L * (12 * dtype.itemsize + 44)
    what = f"{T * K} rows of {L}, gathered, weighed and summed, forward and backward"
    return n_bytes / best(step, device, seconds), what


def _rendezvous(backend: str) -> None:
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(
            f"RANK and WORLD_SIZE are set and no rendezvous was found ({why}); "
            "start with: torchrun --nproc-per-node N -m headway doctor --measure FILE"
        ) from None


def _nearest(gpu: str) -> str:
    """Return the name of the table's machine that supplies what was not measured."""
    known = [name for name in ("h200", "h100", "b200", "a100") if name.upper() in gpu.upper()]
    return known[0] if known else "h100"
