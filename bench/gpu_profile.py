"""Where the time of a sparse layer goes on a GPU, kernel by kernel.

python bench/gpu_profile.py      one small step, for compute-sanitizer
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__" and "--dry" in sys.argv:
    os.environ["HEADWAY_TRITON"], os.environ["TRITON_INTERPRET"] = "interpret", "1"
from bench import gpu_measure
from bench.gpu_rows import Shape
from headway.config import BalanceConfig
from headway.model.balance import balance_loss
from headway.model.layers import MoE, MultiHeadLatentMoE

if TYPE_CHECKING:
    from bench.gpu_stages import Record

SHOWN = 16
"""Kernels of a layer that are printed; all are kept."""


def build(s: Shape, aux: float, device: torch.device) -> tuple[torch.nn.Module, Tensor]:
    """A layer of width H·L (flat for one head) and its tokens."""
    torch.manual_seed(0)
    balance, D = BalanceConfig(aux=aux), s.H * s.L
    with torch.device(device):
        sizes = (s.E, s.K, s.F)
        options = {"activation": s.activation, "balance": balance, "recompute": True}
        if s.H == 1:
            made: torch.nn.Module = MoE(D, *sizes, **options)
        else:
            made = MultiHeadLatentMoE(D, s.H, *sizes, **options)
    return made, torch.randn(s.T, D, device=device, dtype=torch.bfloat16, requires_grad=True)


def step_of(s: Shape, aux: float, device: torch.device) -> Callable[[], object]:
    """Forward, the balance loss, and backward to all inputs and weights."""
    made, x = build(s, aux, device)
    d_out, wanted = torch.randn_like(x), [x, *made.parameters()]
    config = BalanceConfig(aux=aux)

    def step() -> object:
        out, stats = made(x)
        outs, grads = [out], [d_out]
        if aux:
            outs.append(balance_loss([stats], config))
            grads.append(torch.ones_like(outs[-1]))
        return torch.autograd.grad(outs, wanted, grads)

    return step


def layer(s: Shape, aux: float, record: "Record") -> dict:
    """Milliseconds of a step of one layer, and of each of its kernels."""
    step = step_of(s, aux, record.device)
    ms = statistics.median(gpu_measure.times({"step": step}, record.repeats)["step"])
    found = kernels(step, min(3, record.repeats), record.device)
    return {
        "shape": asdict(s),
        "aux": aux,
        "layer_ms": ms,
        "device_ms": sum(k["ms"] for k in found),
        "flop": s.flop(),
        "kernels": found,
    }


def kernels(call: Callable[[], object], repeats: int, device: torch.device) -> list[dict]:
    """What ran on the device in one call: name, milliseconds, launches; the longest first."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    if on_gpu:
        call()
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(repeats):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        total = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if total > 0:
            rows.append(
                {
                    "name": event.key[:120],
                    "ms": total / 1e3 / repeats,
                    "launches": event.count / repeats,
                }
            )
    return sorted(rows, key=lambda row: -row["ms"])


def lines(row: dict) -> Iterator[str]:
    rate = row["flop"] / row["device_ms"] / 1e9 if row["device_ms"] else 0.0
    yield (
        f"{row['what']}: {row['layer_ms']:.3f} ms, on the device {row['device_ms']:.3f}, "
        f"{rate:.0f} TFLOP/s of the experts' definition"
    )
    for k in row["kernels"][:SHOWN]:
        yield f"    {k['ms']:8.3f} ms  {k['launches']:4.0f}×  {k['name'][:70]}"


if __name__ == "__main__":
    where = "cpu" if "--dry" in sys.argv else "cuda"
    smalls = (Shape(6, 2, 16, 3, 2, 16),)
    if where == "cuda":
        smalls = (Shape(40, 2, 64, 9, 3, 48), Shape(70, 1, 384, 130, 4, 32, "gelu"))
    for small in smalls:
        step_of(small, 0.01, torch.device(where))()
    if where == "cuda":
        torch.cuda.synchronize()
    print("small steps done")
