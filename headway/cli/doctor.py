"""`headway doctor`: what is here, which paths will run and why, what each missing extra would
add."""

import importlib.util
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from headway.config import DataConfig
from headway.data.cache import root_of
from headway.kernels.cpp import cpp_kernels as cpu_kernels
from headway.kernels.experts import choose
from headway.kernels.gpu import gpu
from headway.kernels.precision import native_bfloat16
from headway.report.provenance import provenance

EXTRAS = {
    "gpu": (("triton",), "the kernels of GPUs (torch for CUDA brings it)"),
    "hf": (("transformers",), "comparison with Hugging Face models in bench/"),
    "data": (("datasets", "pyarrow"), "--data hf:NAME[:SPLIT] and parquet files"),
    "dev": (("pytest", "hypothesis", "ruff", "pyright", "selenium"), "the tests and linters"),
}
"""Extra → its modules, and what they add."""


def examine() -> dict[str, Any]:
    """Everything that `render` shows, JSON-ready. Takes about a second."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    native = native_bfloat16(device)
    found = {
        **provenance(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "native_bfloat16": native,
        "dtype": "bfloat16" if native else "float32",
        "matmul_gflops": {"float32": round(matmul_gflops(device, torch.float32), 1)},
        "extras": {
            name: {"missing": [m for m in modules if not _installed(m)], "adds": adds}
            for name, (modules, adds) in EXTRAS.items()
        },
        "cpu_kernels": cpu_kernels().why,
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "browser": shutil.which("chromium") or shutil.which("google-chrome"),
        "shm_gib": _free_gib(Path("/dev/shm")),
        "cache": str(root_of(DataConfig())),
        "cache_free_gib": _free_gib(root_of(DataConfig())),
    }
    if native:  # where it is emulated the measurement would take minutes
        found["matmul_gflops"]["bfloat16"] = round(matmul_gflops(device, torch.bfloat16), 1)
    found["paths"] = _paths(found)
    return found


def matmul_gflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """10⁹ FLOP/s of square matmuls, the best of several within about `seconds`."""
    n = 4096 if device.type == "cuda" else 768
    a = torch.ones(n, n, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    torch.mm(a, a)
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best / 1e9


def render(found: dict[str, Any]) -> str:
    """Text for people."""
    machine = found["machine"]
    cpu = [machine["cpu"], f"{machine['cores']} cores", machine["cpu_capability"]]
    gpu = f"{machine['gpus']} × {machine['gpu']}, {machine['gpu_memory_gib']} GiB"
    rates = [f"{rate:,} GFLOP/s in {name}" for name, rate in found["matmul_gflops"].items()]
    rows = {
        "versions": ", ".join(f"{name} {v}" for name, v in found["versions"].items()),
        "commit": found["commit"] + (", with changes" if found["dirty"] else ""),
        "cpu": ", ".join([*cpu, f"{machine['memory_gib']} GiB"]),
        "gpu": gpu if machine["gpu"] else "none",
        "matmul": ", ".join(rates),
        "cache": f"{found['cache']}, {found['cache_free_gib']} GiB free",
    }
    extras = {}
    for name, extra in found["extras"].items():
        missing = ", ".join(extra["missing"])
        fix = f"missing {missing}: pip install 'headway[{name}]' adds {extra['adds']}"
        extras[name] = fix if missing else "installed"
    lines = _table(rows, "")
    lines += ["", "paths that will run", *_table(found["paths"], "  ")]
    return "\n".join([*lines, "", "extras", *_table(extras, "  ")])


def _table(rows: dict[str, str], indent: str) -> list[str]:
    return [f"{indent}{name:<20} {text}" for name, text in rows.items()]


def _paths(found: dict[str, Any]) -> dict[str, str]:
    """What runs, and why."""
    device, native = found["device"], found["native_bfloat16"]
    if native:
        why = f"this {device} multiplies it natively"
    elif device == "cuda":
        why = "this GPU has no bfloat16"
    else:
        why = "this CPU has neither AVX512-BF16 nor AMX, so bfloat16 would be emulated, far slower"
    can_compile = found["compiler"] or device == "cuda"
    if found["shm_gib"] is None:
        shm = "not there"
    else:
        shm = f"{found['shm_gib']} GiB free"
    return {
        "matmuls": f"{found['dtype']} on {device}: {why}",
        "experts": _experts(device, torch.bfloat16 if native else torch.float32),
        "C++ kernels": found["cpu_kernels"] if device == "cpu" else "not on this device",
        "routing": f"exact top-k, stable counting sort: {_routing(found)}",
        "attention": "causal in C++ where the CPU kernels run, else PyTorch's "
        "scaled_dot_product_attention (kernels/attention.py)",
        "torch.func": "it, forward mode and second derivatives take each operator's reference in "
        "PyTorch, where every expert sees every token (kernels/differentiate.py)",
        "run.compile": "possible" if can_compile else "not possible: there is no C++ compiler",
        "browser": found["browser"] or "none: the report's browser tests are skipped",
        "/dev/shm": f"{shm}; nothing here needs it: data are memory-mapped in this process",
    }


def _routing(found: dict[str, Any]) -> str:
    """Which kernels route, and why not those of the GPU."""
    if gpu().device:
        return f"Triton, no logits in memory; {gpu().why} (kernels/gpu/route.py)"
    if found["device"] == "cpu":
        return f"{found['cpu_kernels']} (kernels/route.py); no Triton: {gpu().why}"
    return f"PyTorch (kernels/route.py); no Triton: {gpu().why}"


def _experts(device: str, dtype: torch.dtype) -> str:
    """The path of experts."""
    return f"{choose(device, dtype, 64, 256).why} (kernels/experts.py)"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _free_gib(path: Path) -> float | None:
    """Free space where `path` is or would be made."""
    while not path.exists():
        if path == path.parent or str(path) == "/dev/shm":
            return None
        path = path.parent
    return round(shutil.disk_usage(os.fspath(path)).free / 2**30, 1)
