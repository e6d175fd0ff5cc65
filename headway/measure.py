"""`headway doctor --measure FILE`: what this machine really does, for `headway plan --machine`.

Every rate is the best of several repetitions. Under torchrun all ranks measure at the same time, as
in training, rank 0 writes what it saw, and the network is measured too.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.config import BalanceConfig, RouterConfig, UsageError
from headway.kernels.attention import attention
from headway.model.experts import Experts
from headway.model.router import Router
from headway.plan.cost import mean_keys
from headway.report.provenance import provenance
from headway.train.resolve import native_bfloat16

Show = Callable[[str], None]


def measure(path: Path, show: Show = lambda text: None, seconds: float = 0.5) -> dict[str, Any]:
    """Measures, writes the machine file and returns what it holds; `seconds` per number.

    `show` is called with a line after each number, on rank 0 alone. Raises UsageError where the
    file's folder is missing or no rendezvous is found, before measuring.
    """
    if not path.parent.is_dir():
        raise UsageError(f"--measure {path}: there is no folder {path.parent}; make it first")
    cuda = torch.cuda.is_available()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1:
        _rendezvous("nccl" if cuda else "gloo")
    try:
        found = _all(device, rank, ranks, local, show if rank == 0 else lambda text: None, seconds)
    finally:
        if ranks > 1:
            dist.destroy_process_group()
    if rank == 0:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(path)
    return found


def _all(
    device: torch.device, rank: int, ranks: int, local: int, show: Show, seconds: float
) -> dict[str, Any]:
    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    name = str(dtype).removeprefix("torch.")
    origin = provenance()
    machine = origin["machine"]
    big = device.type == "cuda"
    wide, rows = (8192, 16384) if big else (2048, 2048)
    measured: dict[str, float] = {}
    details: dict[str, Any] = {}

    def note(key: str, value: float, unit: str, what: str) -> None:
        details[key] = {"value": value, "unit": unit, "what": what}
        show(f"{key:<22} {value:>12,.4g} {unit:<8} {what}")

    for kind in dict.fromkeys((dtype, torch.float32)):
        large = matmul_flops(device, kind, wide, wide, wide, seconds)
        small = matmul_flops(device, kind, rows, 256, 1024, seconds)
        peak = max(large, small)  # on a CPU the small one may be the faster: it stays in the cache
        measured["peak" if kind == torch.bfloat16 else "peak_float32"] = peak
        if kind == dtype:
            measured["efficiency"], measured["narrow_efficiency"] = large / peak, small / peak
        kind_name = str(kind).removeprefix("torch.")
        note(f"matmul {kind_name}", large / 1e9, "GFLOP/s", f"{wide}³")
        note(f"narrow {kind_name}", small / 1e9, "GFLOP/s", f"[{rows}, 256] × [256, 1024]")
    peak = measured["peak" if dtype == torch.bfloat16 else "peak_float32"]
    rate, what = experts_flops(device, dtype, seconds)
    measured["experts_efficiency"] = rate / peak
    note(f"experts {name}", rate / 1e9, "GFLOP/s", what)
    rate, what = attention_flops(device, dtype, seconds)
    measured["attention_efficiency"] = rate / peak
    note(f"attention {name}", rate / 1e9, "GFLOP/s", what)
    n = 1 << (30 if big else 27)
    measured["memory_bandwidth"] = copy_bandwidth(device, n, seconds)
    note("memory copy", measured["memory_bandwidth"] / 1e9, "GB/s", f"{n >> 20} MiB, both ways")
    if big:
        measured["memory"] = float(torch.cuda.mem_get_info(device)[0])
        note("memory", measured["memory"] / 1e9, "GB", "free on the device")
    elif machine["memory_gib"]:
        measured["memory"] = machine["memory_gib"] * 2**30 / local
        note("memory", measured["memory"] / 1e9, "GB", f"of the machine / {local} processes")
    if ranks > 1:
        bandwidth, latency, what = exchange(device, ranks, seconds)
        measured["intra_node" if ranks == local else "inter_node"] = bandwidth
        measured["latency"] = latency
        note("all-to-all", bandwidth / 1e9, "GB/s", what)
        note("latency", latency * 1e6, "µs", "per message")
    return {
        "name": machine["gpu"] if big else f"{machine['cpu']}, {torch.get_num_threads()} threads",
        "based_on": _nearest(machine["gpu"]) if big else "cpu",
        "dtype": name,
        "ranks": ranks,
        "measured": measured,
        "details": details,
        **origin,
    }


def best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of the repetitions that fit into `seconds`, at least two after one that does not
    count."""
    times: list[float] = []
    end = 0.0
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
        end = end or time.perf_counter() + seconds
    return min(times[1:])


def matmul_flops(
    device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int, seconds: float
) -> float:
    """FLOP/s of `[rows, inner] × [inner, columns]`."""
    a = torch.ones(rows, inner, device=device, dtype=dtype)
    b = torch.ones(inner, columns, device=device, dtype=dtype)
    return 2 * rows * inner * columns / best(lambda: a @ b, device, seconds)


def copy_bandwidth(device: torch.device, n_bytes: int, seconds: float) -> float:
    """Bytes/s of a copy, read and written bytes together."""
    a = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)  # zeros touches the pages; empty would fault in the first copy
    return 2 * n_bytes / best(lambda: b.copy_(a), device, seconds)


def experts_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[float, str]:
    """FLOP/s of the experts, forward and backward, and the shape."""
    T, H, L, E, K, F = (16384, 8, 256, 64, 8, 512) if device.type == "cuda" else _SMALL_EXPERTS
    torch.manual_seed(0)
    with device:
        layer = Experts(H, E, L, F, "swiglu")
        router = Router(H, L, E, K, RouterConfig(), BalanceConfig())
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
    """FLOP/s of causal attention, forward and backward, counting what causality leaves."""
    B, S, N, d = (4, 4096, 16, 128) if device.type == "cuda" else (4, 256, 4, 64)
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, S, N, d, device=device).to(dtype).requires_grad_() for _ in range(3))
    upstream = torch.ones_like(q)

    def step() -> None:
        attention(q, k, v).backward(upstream)

    flops = 3 * 4 * B * N * d * S * mean_keys(S, 0)
    what = f"B {B}, S {S}, N {N}, d {d}, forward and backward"
    return flops / best(step, device, seconds), what


def exchange(device: torch.device, ranks: int, seconds: float) -> tuple[float, float, str]:
    """(bytes/s leaving a rank, seconds per message, sizes) of the all-to-all over all ranks: time =
    bytes / bandwidth + latency·(P−1) through two sizes."""
    sizes = (1 << 10, 1 << (28 if device.type == "cuda" else 23))
    times = []
    for size in sizes:
        a = torch.zeros(size // ranks * ranks, dtype=torch.uint8, device=device)
        b = torch.empty_like(a)
        times.append(_best_together(a, b, device, seconds))
    small, large = (size // ranks * (ranks - 1) for size in sizes)
    rate = (times[1] - times[0]) / (large - small)
    if rate <= 0:  # noise: the large one was not slower
        rate = times[1] / large
    latency = max(times[0] - small * rate, 1e-9) / (ranks - 1)
    return 1 / rate, latency, f"{sizes[0]:,} and {sizes[1]:,} bytes over {ranks} ranks"


def _best_together(a: Tensor, b: Tensor, device: torch.device, seconds: float) -> float:
    """As `best`, with the same number of repetitions on every rank."""
    times = []
    repeats = max(3, min(50, int(50 * seconds)))
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        dist.all_to_all_single(b, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


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
    """The table's machine for what was not measured."""
    known = [name for name in ("h200", "h100", "b200", "a100") if name.upper() in gpu.upper()]
    return known[0] if known else "h100"
