"""What `headway doctor` shows: hardware, selected kernels and why, missing extras."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from headway.config import DataConfig
from headway.data.cache import root_of
from headway.kernels.cpp import cpp_kernels
from headway.kernels.gpu import gpu_kernels
from headway.kernels.paths import explain
from headway.kernels.precision import native_bfloat16
from headway.measure.rates import matmul_flops
from headway.report.provenance import provenance

EXTRAS = {
    "gpu": (("triton",), "the kernels of GPUs (torch for CUDA brings it)"),
    "hf": (("transformers",), "`import --check` and `export --check`"),
    "serve": (
        ("fastapi", "uvicorn", "prometheus_client", "jinja2", "llguidance"),
        "`headway serve` and chat templates",
    ),
    "gguf": (("gguf",), "`export --format gguf`"),
    "data": (
        ("datasets", "datasketch", "pyarrow"),
        "--data hf:NAME[:SPLIT], parquet files, near-duplicates",
    ),
    "eval": (("lm_eval",), "tasks of lm-evaluation-harness through the engine"),
    "lab": (("scipy", "optuna"), "`headway compare`, laws, studies; sweeps by Optuna"),
    "track": (("tensorboard", "wandb", "trackio"), "`run.track`: records in trackers too"),
    "cluster": (("ray",), "`headway sweep --on ray`"),
    "dev": (("pytest", "hypothesis", "ruff", "pyright", "selenium"), "the tests and linters"),
}
"""Extra → its modules, and what they add."""


def examine() -> dict[str, Any]:
    """Return everything that `render` shows, JSON-ready. Takes about a second."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    native = native_bfloat16(device)
    rates = {"float32": _matmul_gflops(device, torch.float32)}
    if native:  # where it is emulated the measurement would take minutes
        rates["bfloat16"] = _matmul_gflops(device, torch.bfloat16)
    facts = {
        **provenance(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "native_bfloat16": native,
        "dtype": "bfloat16" if native else "float32",
        "matmul_gflops": rates,
        "extras": {
            name: {"missing": [m for m in modules if find_spec(m) is None], "adds": adds}
            for name, (modules, adds) in EXTRAS.items()
        },
        "cpu_kernels": cpp_kernels().why,
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "browser": shutil.which("chromium") or shutil.which("google-chrome"),
        "shm_gib": _free_gib(Path("/dev/shm")),
        "cache": str(root_of(DataConfig())),
        "cache_free_gib": _free_gib(root_of(DataConfig())),
    }
    return facts | {"paths": _paths(facts)}


def _matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    n = 4096 if device.type == "cuda" else 768
    return round(matmul_flops(device, dtype, n, n, n, 0.3) / 1e9, 1)


def render(facts: dict[str, Any]) -> str:
    """Format what `examine` returned as text for people."""
    machine = facts["machine"]
    cpu = [machine["cpu"], f"{machine['cores']} cores", machine["cpu_capability"]]
    gpu = f"{machine['gpus']} × {machine['gpu']}, {machine['gpu_memory_gib']} GiB"
    rates = [f"{rate:,} GFLOP/s in {name}" for name, rate in facts["matmul_gflops"].items()]
    rows = {
        "versions": ", ".join(f"{name} {v}" for name, v in facts["versions"].items()),
        "commit": facts["commit"] + (", with changes" if facts["dirty"] else ""),
        "cpu": ", ".join([*cpu, f"{machine['memory_gib']} GiB"]),
        "gpu": gpu if machine["gpu"] else "none",
        "matmul": ", ".join(rates),
        "cache": f"{facts['cache']}, {facts['cache_free_gib']} GiB free",
    }
    extras = {}
    for name, extra in facts["extras"].items():
        missing = ", ".join(extra["missing"])
        fix = f"missing {missing}: pip install 'headway[{name}]' adds {extra['adds']}"
        extras[name] = fix if missing else "installed"
    paths = ["", "paths that will run", *_table(facts["paths"], "  ")]
    return "\n".join([*_table(rows, ""), *paths, "", "extras", *_table(extras, "  ")])


def _table(rows: dict[str, str], indent: str) -> list[str]:
    return [f"{indent}{name:<20} {text}" for name, text in rows.items()]


def _paths(facts: dict[str, Any]) -> dict[str, str]:
    """Return what runs and why, for each part."""
    device, native = facts["device"], facts["native_bfloat16"]
    dtype = torch.bfloat16 if native else torch.float32
    if native:
        why = f"this {device} multiplies it natively"
    elif device == "cuda":
        why = "this GPU has no bfloat16"
    else:
        why = "this CPU has neither AVX512-BF16 nor AMX, so bfloat16 would be emulated, far slower"
    can_compile = facts["compiler"] or device == "cuda"
    shm = "not there" if facts["shm_gib"] is None else f"{facts['shm_gib']} GiB free"
    return {
        "matmuls": f"{facts['dtype']} on {device}: {why}",
        "experts": f"{explain(device, dtype, 64, 256)} (kernels/paths.py)",
        "C++ kernels": facts["cpu_kernels"] if device == "cpu" else "not on this device",
        "routing": f"exact top-k, stable counting sort: {_routing(facts)}",
        "attention": "causal in C++ where the CPU kernels run, else PyTorch's "
        "scaled_dot_product_attention (kernels/attention.py)",
        "torch.func": "it, forward mode and second derivatives take each operator's reference in "
        "PyTorch, where every expert sees every token (kernels/differentiate.py)",
        "run.compile": "possible" if can_compile else "not possible: there is no C++ compiler",
        "browser": facts["browser"] or "none: the report's browser tests are skipped",
        "/dev/shm": f"{shm}; nothing here needs it: data are memory-mapped in this process",
    }


def _routing(facts: dict[str, Any]) -> str:
    """Return which kernels route, and why not those of the GPU."""
    if gpu_kernels().device:
        return f"Triton, no logits in memory; {gpu_kernels().why} (kernels/gpu/route.py)"
    used = facts["cpu_kernels"] if facts["device"] == "cpu" else "PyTorch"
    return f"{used} (kernels/route.py); no Triton: {gpu_kernels().why}"


def _free_gib(path: Path) -> float | None:
    """Return the free space where `path` is or would be made; None where it cannot be."""
    while not path.exists():
        if path == path.parent or str(path) == "/dev/shm":
            return None
        path = path.parent
    return round(shutil.disk_usage(path).free / 2**30, 1)
