"""Times of plain collectives, which `headway doctor --measure` keeps for `plan.link`."""

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

Points = tuple[tuple[float, float], ...]
"""(bytes that leave a rank, seconds)."""
TURNS = 4
"""Exchanges beside work in one measurement: one after another, as layers have them."""
LEAST = 5e-3
"""Seconds of the work beside an exchange, at least."""


def measure_curves(
    device: torch.device,
    ranks: int,
    inside: bool,
    sizes: Sequence[int],
    repeats: int,
    group: dist.ProcessGroup | None = None,
    overlap_cost: bool = False,
) -> list[Curve]:
    """Times of training's collectives, in which about `sizes` bytes leave each rank: an all-to-all,
    two of half the size at once, an all-reduce, and with `overlap_cost` what an all-to-all adds to
    matmuls that go on beside it and take longer. Medians over the repetitions, of the slowest rank;
    the same on every rank. `ranks` is the size of the group."""
    axis = Axis("all", ranks, dist.get_rank(group), group)

    def tensors(size: int) -> tuple[Tensor, Tensor]:
        """To send and to receive."""
        x = torch.zeros(size // (ranks - 1) * ranks, dtype=torch.uint8, device=device)
        return x, torch.empty_like(x)

    def exchange(at_once: int) -> Points:
        points = []
        for size in sizes:
            pairs = [tensors(size // at_once) for _ in range(at_once)]

            def run(pairs: Sequence[tuple[Tensor, Tensor]] = pairs) -> None:
                posted = [all_to_all(y, x, axis) for x, y in pairs]
                for each in posted:
                    each.wait()

            seconds = _together(run, device, repeats, group)
            leaving = at_once * (pairs[0][0].numel() // ranks) * (ranks - 1)
            points.append((float(leaving), seconds))
        return tuple(points)

    def added(alone: Points) -> Points:
        """To matmuls that take twice as long as the exchange alone, and some milliseconds."""
        width = 4096 if device.type == "cuda" else 256
        a = torch.ones(width, width, dtype=torch.bfloat16, device=device)
        each = _together(lambda: a @ a, device, repeats, group)
        points = []
        for size, (leaving, seconds) in zip(sizes, alone, strict=True):
            x, y = tensors(size)
            n = math.ceil(max(2 * seconds, LEAST) / each)

            def run(travels: bool, x: Tensor = x, y: Tensor = y, n: int = n) -> None:
                for _ in range(TURNS):
                    posted = all_to_all(y, x, axis) if travels else None
                    for _ in range(n):
                        torch.matmul(a, a)
                    if posted is not None:
                        posted.wait()

            both = _together(partial(run, True), device, repeats, group)
            more = both - _together(partial(run, False), device, repeats, group)
            points.append((leaving, max(more / TURNS, 1e-6)))
        return tuple(points)

    def ring() -> Points:
        points = []
        for size in sizes:
            x = torch.zeros(size // 8 * ranks // (ranks - 1), device=device)
            seconds = _together(lambda x=x: dist.all_reduce(x, group=group), device, repeats, group)
            points.append((2 * 4 * x.numel() * (ranks - 1) / ranks, seconds))
        return tuple(points)

    alone = exchange(1)
    found = [
        Curve("all_to_all", ranks, inside, 1, alone),
        Curve("all_to_all", ranks, inside, 2, exchange(2)),
        Curve("all_reduce", ranks, inside, 1, ring()),
    ]
    return (
        [*found, Curve("overlap_cost", ranks, inside, 1, added(alone))] if overlap_cost else found
    )


def two_numbers(curve: Curve) -> tuple[float, float]:
    """(bytes/s leaving a rank, seconds per message) of an all-to-all: of its largest size, and of
    its smallest."""
    (_, least), (n_bytes, seconds) = curve.points[0], curve.points[-1]
    return n_bytes / seconds, least / (curve.ranks - 1)


def _together(
    run: Callable[[], object],
    device: torch.device,
    repeats: int,
    group: dist.ProcessGroup | None,
) -> float:
    """Median seconds of the slowest rank, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()  # of all: groups measure at the same time, as in training
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(times[1:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    return statistics.median(slowest.tolist())
