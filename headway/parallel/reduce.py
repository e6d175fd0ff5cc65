"""One loss, one token count, one gradient, one norm, whatever the mesh.

Every rank's loss is its part of a sum over the global batch (its nats over the *global* number of
targets, its balance loss over the number of ranks). Gradients are therefore sums over ranks, and
nothing is divided afterwards: an expert's gradient has arrived through the exchange from all ranks
whose tokens it saw, and what is left to add lies with its replicas (arXiv 2602.04870's code forgets
to divide there, and clips every rank by another norm).
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.model.balance import SUMMED, RouteStats
from headway.parallel.mesh import Axis, Mesh
from headway.parallel.placement import Sharding, to_local

BUCKET = 4 << 20
"""Bytes of gradients that are added up in one message."""
ROW = 4096
"""Elements whose squares are added up in float32."""


def sum_over(axis: Axis, x: Tensor, mesh: Mesh, purpose: str) -> Tensor:
    """Σ of `x` over the ranks of an axis, in place; the same bits on each of them."""
    if axis.size > 1:
        mesh.traffic.add(axis.name, purpose, _ring_bytes(x, axis))
        started = time.perf_counter()
        dist.all_reduce(x, group=axis.group)
        mesh.traffic.waited(axis.name, purpose, time.perf_counter() - started)
    return x


@contextmanager
def summed_gradients(model: nn.Module, sharding: Sharding) -> Iterator[None]:
    """Adds up the gradients of every parameter over its replicas while the backward pass in the
    body, the last of a step, goes on; but for those that FSDP adds up itself.

    Parameters of one axis are joined in buckets of `BUCKET` bytes, last layer first. A bucket
    leaves when its gradients are there and the bucket before it has left, so that all ranks send
    the same in the same order; the end of the body waits for all of them.
    """
    buckets = _buckets(model, sharding)
    handles = []
    leaving = _BucketReducer(buckets, sharding.mesh)
    for bucket in buckets:
        for p in bucket.parameters:
            handles.append(p.register_post_accumulate_grad_hook(partial(leaving.ready, bucket)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    leaving.land()


@dataclass(eq=False)
class _Bucket:
    """Gradients that travel as one message."""

    axis: Axis
    parameters: list[nn.Parameter]
    missing: int
    """Gradients that are not there yet."""
    flat: Tensor | None = None
    work: dist.Work | None = None


class _BucketReducer:
    """The buckets of one backward pass, in their order."""

    def __init__(self, buckets: list[_Bucket], mesh: Mesh) -> None:
        self.buckets, self.mesh, self.next = buckets, mesh, 0

    def ready(self, bucket: _Bucket, _: Tensor) -> None:
        """One more gradient of a bucket is there."""
        bucket.missing -= 1
        assert bucket.missing >= 0, "a gradient was added to after it had been sent"
        while self.next < len(self.buckets) and not self.buckets[self.next].missing:
            self._depart(self.buckets[self.next])
            self.next += 1

    def land(self) -> None:
        """Sends what has not left (no token came by a parameter: it takes its part with zeros) and
        waits for all."""
        for bucket in self.buckets[self.next :]:
            for p in bucket.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self._depart(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None and bucket.flat is not None
            started = time.perf_counter()
            bucket.work.wait()
            seconds = time.perf_counter() - started
            self.mesh.traffic.waited(bucket.axis.name, "gradients", seconds)
            pieces = bucket.flat.split([p.numel() for p in bucket.parameters])
            for p, piece in zip(bucket.parameters, pieces, strict=True):
                _grad(p).copy_(piece.view_as(p))
            bucket.flat = None

    def _depart(self, bucket: _Bucket) -> None:
        flat = torch.cat([_grad(p).flatten() for p in bucket.parameters])
        axis, bucket.flat = bucket.axis, flat
        self.mesh.traffic.add(axis.name, "gradients", _ring_bytes(flat, axis))
        bucket.work = dist.all_reduce(flat, group=axis.group, async_op=True)


def _buckets(model: nn.Module, sharding: Sharding) -> list[_Bucket]:
    """In the order in which backward is expected to fill them: the last layer first."""
    open_: dict[tuple[str, torch.dtype], _Bucket] = {}
    found: list[_Bucket] = []
    for name, p in reversed(list(model.named_parameters())):
        placement = sharding.placements.get(name)
        if placement is None or placement.replicas.size == 1 or placement.shard is not None:
            continue
        key = (placement.replicas.name, p.dtype)
        bucket = open_.get(key)
        if bucket is None:
            bucket = open_[key] = _Bucket(placement.replicas, [], 0)
        bucket.parameters.append(p)
        bucket.missing += 1
        if sum(p.nbytes for p in bucket.parameters) >= BUCKET:
            found.append(open_.pop(key))
    return found + list(open_.values())


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """‖·‖₂ over all elements of all tensors, a float64 scalar; 0 without any.

    Row by row in the tensors' dtype, then in float64: on CPUs torch adds up the squares of a
    float32 tensor one after another, and its norm of 2²⁵ elements is 2e-3 too small.
    """
    rows = []
    for x in tensors:
        flat = x.reshape(-1)
        whole = flat.numel() // ROW * ROW
        rows.append(torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1).double())
        rows.append(torch.linalg.vector_norm(flat[whole:].view(1, -1), dim=1).double())
    wide = torch.cat(rows) if rows else torch.zeros(1, dtype=torch.float64)
    return torch.linalg.vector_norm(wide)


def grad_norm(model: nn.Module, sharding: Sharding) -> Tensor:
    """‖g‖₂ over the gradients of the whole model, each slice counted once; a float64 scalar, the
    same bits on every rank. 0 without gradients."""
    mesh = sharding.mesh
    mine = [
        to_local(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None and (mesh.size == 1 or sharding.placements[name].first)
    ]
    norm = total_norm(mine)
    if mesh.size == 1:
        return norm
    return sum_over(mesh.world, norm.to(mesh.device).square(), mesh, "norm").sqrt()


def global_stats(
    routes: Sequence[RouteStats], sums: Tensor, sharding: Sharding, reads_token: bool
) -> tuple[list[RouteStats], Tensor]:
    """Statistics of all heads over the whole batch, and `sums` (float64 `[n]`) added up over the
    ranks: one reduction of everything that a step has to tell.

    Counts are summed (exactly: float64), the rest is averaged over the ranks that routed tokens of
    a head.
    """
    mesh = sharding.mesh
    if mesh.size == 1:
        return list(routes), sums
    split = mesh.hp.size > 1 and not reads_token
    hp = mesh.hp.size if split else 1
    share = hp / mesh.size  # of one rank in a mean over the ranks that hold its heads

    def place(x: Tensor) -> Tensor:
        """`[H_local, …]` among all heads `[H, …]`."""
        if not split or x.dim() == 0:
            return x
        whole = x.new_zeros(hp, *x.shape)
        whole[mesh.hp.index] = x
        return whole.flatten(0, 1)

    parts: list[Tensor] = []
    for route in routes:
        for name, value in route._asdict().items():
            if value is not None:
                scale = 1.0 if name in SUMMED else share if value.dim() else 1 / mesh.size
                parts.append(place(value.detach().double() * scale))
    flat = torch.cat([sums.to(mesh.device), *(p.flatten() for p in parts)])
    sum_over(mesh.world, flat, mesh, "statistics")
    pieces = iter(flat[len(sums) :].split([p.numel() for p in parts]))
    shapes = iter(parts)
    found = []
    for route in routes:
        values = {
            name: None if value is None else next(pieces).view_as(next(shapes)).to(value.dtype)
            for name, value in route._asdict().items()
        }
        found.append(RouteStats(**values))  # type: ignore[arg-type]
    return found, flat[: len(sums)]


def _ring_bytes(x: Tensor, axis: Axis) -> int:
    """A ring sends each of P pieces P−1 times to be added up, and P−1 times to be known."""
    return 2 * (axis.size - 1) * x.nbytes // axis.size


def _grad(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad
