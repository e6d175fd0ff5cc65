"""Times of plain collectives, which `headway doctor --measure` stores for `plan.link`."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.mesh import Axis
from headway.parallel.p2p import all_to_all
from headway.plan.link import Curve

Point = tuple[float, float]
"""(bytes that a rank sends, seconds)."""
TURNS = 4
"""Exchanges that overlap work in one measurement, one after another as in a model's layers."""
LEAST = 5e-3
"""Least seconds of the work that overlaps an exchange."""


def measure_curves(
    device: torch.device,
    ranks: int,
    inside: bool,
    sizes: Sequence[int],
    repeats: int,
    group: dist.ProcessGroup | None = None,
    overlap_cost: bool = False,
) -> list[Curve]:
    """Return the times of training's collectives, in which each rank sends about `sizes` bytes: an
    all-to-all, two concurrent ones of half the size, an all-reduce, and with `overlap_cost` the
    time that an all-to-all adds to longer matmuls that overlap it. Medians over the repetitions, of
    the slowest rank; the same on every rank. `ranks` is the size of the group."""
    axis = Axis("all", ranks, dist.get_rank(group), group)

    def together(run: Callable[[], object]) -> float:
        """Return the median seconds of the slowest rank, after a warm-up."""
        times = []
        for _ in range(repeats + 1):
            dist.barrier()  # of all: groups measure at the same time, as in training
            times.append(elapsed(run, device))
        slowest = torch.tensor(times[1:], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        return statistics.median(slowest.tolist())

    def tensors(size: int) -> tuple[Tensor, Tensor]:
        """Return a buffer to send and one to receive."""
        x = torch.zeros(size // (ranks - 1) * ranks, dtype=torch.uint8, device=device)
        return x, torch.empty_like(x)

    def exchange(size: int, at_once: int) -> Point:
        pairs = [tensors(size // at_once) for _ in range(at_once)]

        def run() -> None:
            posted = [all_to_all(y, x, axis) for x, y in pairs]
            for each in posted:
                each.wait()

        n_sent = at_once * (pairs[0][0].numel() // ranks) * (ranks - 1)
        return float(n_sent), together(run)

    def ring(size: int) -> Point:
        x = torch.zeros(size // 8 * ranks // (ranks - 1), device=device)
        seconds = together(lambda: dist.all_reduce(x, group=group))
        return 2 * 4 * x.numel() * (ranks - 1) / ranks, seconds

    def added(size: int, n_sent: float, seconds: float) -> Point:
        """Measure what an exchange adds to matmuls that take at least twice as long."""
        x, y = tensors(size)
        n = math.ceil(max(2 * seconds, LEAST) / matmul)

        def run(exchanging: bool) -> None:
            for _ in range(TURNS):
                posted = all_to_all(y, x, axis) if exchanging else None
                for _ in range(n):
                    torch.matmul(a, a)
                if posted is not None:
                    posted.wait()

        more = together(partial(run, True)) - together(partial(run, False))
        return n_sent, max(more / TURNS, 1e-6)

    alone = tuple(exchange(size, 1) for size in sizes)
    measured = [
        Curve("all_to_all", ranks, inside, 1, alone),
        Curve("all_to_all", ranks, inside, 2, tuple(exchange(size, 2) for size in sizes)),
        Curve("all_reduce", ranks, inside, 1, tuple(ring(size) for size in sizes)),
    ]
    if overlap_cost:
        width = 4096 if device.type == "cuda" else 256
        a = torch.ones(width, width, dtype=torch.bfloat16, device=device)
        matmul = together(lambda: a @ a)
        points = tuple(added(size, *point) for size, point in zip(sizes, alone, strict=True))
        measured.append(Curve("overlap_cost", ranks, inside, 1, points))
    return measured


def two_numbers(curve: Curve) -> tuple[float, float]:
    """Return (bytes/s that a rank sends, seconds per message) of an all-to-all: of its largest
    size, and of its smallest."""
    (_, least), (n_bytes, seconds) = curve.points[0], curve.points[-1]
    return n_bytes / seconds, least / (curve.ranks - 1)


def elapsed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, until the device has finished."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
