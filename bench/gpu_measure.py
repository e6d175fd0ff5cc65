"""What bench/gpu_day.py measures of one function: time, memory, what it keeps, and its error."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Call = Callable[..., Tensor]

QUEUE = 2_000_000
"""Clock ticks that the device is kept busy before each measured call, about a millisecond: the
host's launches are then behind it, and a call that waits for the device does not make the next one
in turn start with an empty queue."""


def times(calls: dict[str, Callable[[], object]], repeats: int, warmup: int = 3) -> dict[str, list]:
    """Milliseconds of every repetition of every call; they take turns: A B C A B C …"""
    if not torch.cuda.is_available():
        return _times_on_cpu(calls, repeats)
    marks: dict[str, list] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(QUEUE)
            begin.record()
            call()
            end.record()
            if i >= warmup:
                marks[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in marks.items()}


def _times_on_cpu(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list]:
    found: dict[str, list] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(1e3 * (time.perf_counter() - start))
    return found


def forward_backward(call: Call, inputs: Sequence[Tensor], d_out: Tensor) -> Callable[[], object]:
    """One forward and one backward pass to all inputs that take gradients."""
    wanted = [t for t in inputs if t.requires_grad]
    return lambda: torch.autograd.grad(call(*inputs), wanted, d_out)


def peak_mib(call: Callable[[], object]) -> float | None:
    """MiB that one call allocates above what is there already; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kept_bytes(call: Call, inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> int:
    """Bytes that the forward pass keeps for backward, parameters not counted."""
    known = {t.untyped_storage().data_ptr() for t in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() and storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(*inputs)
    del out
    return sum(storages.values())


def errors(call: Call, truth: Call, inputs: Sequence[Tensor], d_out: Tensor) -> dict[str, float]:
    """Relative error ‖a − b‖/‖b‖ of the output and of the worst gradient; `truth` gets the same
    values in float64."""
    out, *grads = _results(call, inputs, d_out)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    expected, *expected_grads = _results(truth, wide, d_out.double())
    worst = max(_error(g, w) for g, w in zip(grads, expected_grads, strict=True))
    return {"output": _error(out, expected), "gradient": worst}


def _results(call: Call, inputs: Sequence[Tensor], d_out: Tensor) -> list[Tensor]:
    out = call(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, d_out.to(out.dtype))]


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def matmul_tflops(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """10¹² FLOP/s of a large bfloat16 matmul: the ceiling of everything made of products."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = times({"mm": lambda: a @ b}, repeats)["mm"]
    return 2 * size**3 / statistics.median(found) / 1e9


def copy_gbs(device: torch.device, mib: int = 1024, repeats: int = 20) -> float:
    """10⁹ bytes/s, read and written, of a large copy: the ceiling of everything else."""
    a = torch.zeros(mib * 2**20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    found = times({"copy": lambda: b.copy_(a)}, repeats)["copy"]
    return 2 * a.numel() / statistics.median(found) / 1e6
