"""Times of plain collectives, which `headway doctor --measure` keeps for `plan.link`."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.mesh import Axis
from headway.parallel.pairwise import all_to_all
from headway.plan.link import Curve


def curves(
    device: torch.device,
    ranks: int,
    inside: bool,
    sizes: Sequence[int],
    repeats: int,
    group: dist.ProcessGroup | None = None,
) -> list[Curve]:
    """Times of training's collectives, in which about `sizes` bytes leave each rank: an all-to-all,
    two of half the size at once, an all-reduce. Medians over the repetitions, of the slowest rank;
    the same on every rank. `ranks` is the size of the group."""

    axis = Axis("all", ranks, dist.get_rank(group), group)

    def exchange(at_once: int) -> tuple[tuple[float, float], ...]:
        points = []
        for size in sizes:
            each = size // at_once // (ranks - 1)
            a = [
                torch.zeros(each * ranks, dtype=torch.uint8, device=device) for _ in range(at_once)
            ]
            b = [torch.empty_like(x) for x in a]

            def run(a: Sequence[Tensor] = a, b: Sequence[Tensor] = b) -> None:
                posted = [all_to_all(y, x, axis) for y, x in zip(b, a, strict=True)]
                for each in posted:
                    each.wait()

            seconds = _together(run, device, repeats, group)
            points.append((float(each * at_once * (ranks - 1)), seconds))
        return tuple(points)

    def ring() -> tuple[tuple[float, float], ...]:
        points = []
        for size in sizes:
            x = torch.zeros(size // 8 * ranks // (ranks - 1), device=device)
            seconds = _together(lambda x=x: dist.all_reduce(x, group=group), device, repeats, group)
            points.append((2 * 4 * x.numel() * (ranks - 1) / ranks, seconds))
        return tuple(points)

    return [
        Curve("all_to_all", ranks, inside, 1, exchange(1)),
        Curve("all_to_all", ranks, inside, 2, exchange(2)),
        Curve("all_reduce", ranks, inside, 1, ring()),
    ]


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
