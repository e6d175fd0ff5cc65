"""Where the time of a whole training step of `small` goes: the stage `whole` of bench/gpu_day.py.

Each row is a step as the training loop makes it (gradient, update) on random tokens: tokens/s, the
time on the device beside it, the optimisers' share, the largest kernels, and how often the host
launches, copies and waits. bench/launches.py counts the same without a GPU.
"""

import gc
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.launches import Step, step_of
from headway.config import Config
from headway.recipes import load

if TYPE_CHECKING:
    from bench.gpu_stages import Record

LARGEST = 25
"""Kernels of a row."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def configs(dry: bool) -> dict[str, Config]:
    """The recipe at its micro-batch of 16 and at larger ones; a toy of it in a dry run."""
    small = load("small")
    if dry:
        moe = replace(small.model.moe, n_heads=2, n_experts=4, top_k=2, d_expert=16, d_shared=16)
        sizes = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32}
        model = replace(small.model, vocab_size=300, moe=moe, **sizes)
        data = replace(small.data, seq_len=8, batch_size=1, micro_batch_size=1)
        return {"small": replace(small, model=model, data=data)}
    sizes = {"small": 16, "small, micro-batches of 32": 32, "small, micro-batches of 64": 64}
    return {
        name: replace(small, data=replace(small.data, micro_batch_size=n))
        for name, n in sizes.items()
    }


def measure(record: "Record") -> None:
    """Every row of the stage."""
    for name, config in configs(record.dry).items():
        record.attempt(name, lambda c=config: row(c, record))
        if not record.dry and name == "small":
            record.attempt("small, compiled", lambda c=config: row(c, record, compiled=True))


def row(config: Config, record: "Record", compiled: bool = False) -> dict:
    """One row."""
    on_gpu = record.device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    step = step_of(config, device=record.device)
    if compiled:
        for block in step.model.layers:
            block.compile()
    for _ in range(0 if record.dry else 3):
        step.run()
    seconds = [step_seconds(step, on_gpu) for _ in range(1 if record.dry else 5)]
    gradient_s, update_s = (statistics.median(part) for part in zip(*seconds, strict=True))
    tokens = sum(batch.tokens_BS.numel() for batch in step.batch)
    return {
        "tokens_per_second": tokens / (gradient_s + update_s),
        "step_ms": 1e3 * (gradient_s + update_s),
        "update_ms": 1e3 * update_s,
        "raw_ms": [1e3 * sum(part) for part in seconds],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        **profiled(step, 1 if record.dry else 3, on_gpu),
    }


def step_seconds(step: Step, on_gpu: bool) -> tuple[float, float]:
    """Seconds of the gradient, which ends in a wait for the device, and of the update."""
    start = time.perf_counter()
    result = step.gradient()
    middle = time.perf_counter()
    step.update(result)
    if on_gpu:
        torch.cuda.synchronize()
    return middle - start, time.perf_counter() - middle


def profiled(step: Step, repeats: int, on_gpu: bool) -> dict:
    """What the profiler sees, per step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            step.run()
        if on_gpu:
            torch.cuda.synchronize()
    device, calls = [], {}
    for event in profiler.key_averages():
        there = event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
        ms = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if there and ms > 0 and not event.is_user_annotation:  # `Optimizer.step` spans its kernels
            device.append((ms / 1e3 / repeats, event.count / repeats, event.key[:120]))
        if event.key.startswith("cu"):
            calls[event.key] = event.count / repeats
    device.sort(reverse=True)
    return {
        "device_ms": sum(ms for ms, _, _ in device),
        "launches": sum(n for _, n, name in device if not name.startswith("Mem")),
        "copies": sum(n for name, n in calls.items() if "Memcpy" in name),
        "waits": sum(n for name, n in calls.items() if name in WAITS),
        "kernels": [{"name": k, "ms": ms, "launches": n} for ms, n, k in device[:LARGEST]],
    }
