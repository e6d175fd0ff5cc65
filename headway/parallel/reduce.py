"""One loss, one token count, one gradient, one norm, whatever the mesh.

Every rank's loss is its part of a sum over the global batch (its nats over the *global* number of
targets, its balance loss over the number of ranks). Gradients are therefore sums over ranks and
nothing is divided afterwards: an expert's gradient already contains the tokens of all ranks that
sent it some, through the backward of the exchange, and only its replicas are left to be summed
(arXiv 2602.04870's code forgets to divide there, and clips every rank by another norm)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.model.balance import SUMMED, RouteStats
from headway.parallel.mesh import Axis, Mesh
from headway.parallel.placement import Sharding, to_local

BUCKET = 4 << 20
"""Bytes of gradients that are summed in one message."""
ROW = 4096
"""Elements whose squares are summed in float32."""


def sum_over(axis: Axis, x: Tensor, mesh: Mesh, purpose: str) -> Tensor:
    """Sum `x` over the ranks of an axis, in place; the result has the same bits on all of them."""
    if axis.size > 1:
        mesh.traffic.add(axis.name, purpose, ring_bytes(x, axis))
        with mesh.traffic.waiting(axis.name, purpose):
            dist.all_reduce(x, group=axis.group)
    return x


@contextmanager
def summed_gradients(model: nn.Module, sharding: Sharding) -> Iterator[None]:
    """Sum the gradients of every parameter over its replicas, overlapped with the backward pass in
    the body, the last of a step; FSDP sums its own.

    Parameters with the same replicas share buckets of `BUCKET` bytes, last layer first. A bucket is
    reduced when its gradients are complete and the bucket before it has been issued, so that all
    ranks issue the same in the same order; the end of the body waits for all of them."""
    reducer = _BucketReducer(_buckets(model, sharding), sharding.mesh)
    with ExitStack() as hooks:
        for bucket in reducer.buckets:
            mark_ready = partial(reducer.mark_ready, bucket)
            for p in bucket.parameters:
                hooks.enter_context(p.register_post_accumulate_grad_hook(mark_ready))
        yield
    reducer.finish()


@dataclass(eq=False)
class _Bucket:
    """Gradients that are reduced in one message."""

    axis: Axis
    parameters: list[nn.Parameter] = field(default_factory=list)
    pending: int = 0
    """Gradients that backward has not computed yet."""
    flat: Tensor | None = None
    work: dist.Work | None = None


class _BucketReducer:
    """All-reduces the buckets of one backward pass, in their order."""

    def __init__(self, buckets: list[_Bucket], mesh: Mesh) -> None:
        self.buckets, self.mesh, self.next = buckets, mesh, 0

    def mark_ready(self, bucket: _Bucket, _: Tensor) -> None:
        """Count a gradient of a bucket, and issue the buckets that are complete."""
        bucket.pending -= 1
        assert bucket.pending >= 0, "a gradient changed after it had been sent"
        while self.next < len(self.buckets) and not self.buckets[self.next].pending:
            self._issue(self.buckets[self.next])
            self.next += 1

    def finish(self) -> None:
        """Flush the remaining buckets, where a parameter without a gradient (no token reached it)
        contributes zeros, and wait for all."""
        for bucket in self.buckets[self.next :]:
            for p in bucket.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self._issue(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None and bucket.flat is not None
            with self.mesh.traffic.waiting(bucket.axis.name, "gradients"):
                bucket.work.wait()
            sums = bucket.flat.split([p.numel() for p in bucket.parameters])
            for p, total in zip(bucket.parameters, sums, strict=True):
                _grad(p).copy_(total.view_as(p))
            bucket.flat = None

    def _issue(self, bucket: _Bucket) -> None:
        flat = torch.cat([_grad(p).flatten() for p in bucket.parameters])
        axis, bucket.flat = bucket.axis, flat
        self.mesh.traffic.add(axis.name, "gradients", ring_bytes(flat, axis))
        bucket.work = dist.all_reduce(flat, group=axis.group, async_op=True)


def _buckets(model: nn.Module, sharding: Sharding) -> list[_Bucket]:
    """Return the buckets in the order in which backward fills them: the last layer first."""
    partial_: dict[tuple[str, torch.dtype], _Bucket] = {}
    full: list[_Bucket] = []
    for name, p in reversed(list(model.named_parameters())):
        placement = sharding.placements.get(name)
        if placement is None or placement.replicas.size == 1 or placement.shard is not None:
            continue
        key = (placement.replicas.name, p.dtype)
        bucket = partial_.setdefault(key, _Bucket(placement.replicas))
        bucket.parameters.append(p)
        bucket.pending += 1
        if sum(p.nbytes for p in bucket.parameters) >= BUCKET:
            full.append(partial_.pop(key))
    return full + list(partial_.values())


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return ‖·‖₂ over all elements of all tensors, a float64 scalar; 0 without any. Rows are
    summed in the tensors' dtype, their norms in float64: on CPUs torch sums the squares of a
    float32 tensor one after another, and its norm of 2²⁵ elements is 2e-3 too small. GPUs sum in
    trees, all tensors in a few launches."""
    rows, tensors = [], list(tensors)
    if tensors and tensors[0].device.type != "cpu":
        norms = torch._foreach_norm(tensors, dtype=torch.float64)
        return torch.linalg.vector_norm(torch.stack(norms))
    for x in tensors:
        flat = x.reshape(-1)
        end = flat.numel() // ROW * ROW
        rows.append(torch.linalg.vector_norm(flat[:end].view(-1, ROW), dim=1).double())
        rows.append(torch.linalg.vector_norm(flat[end:].view(1, -1), dim=1).double())
    wide = torch.cat(rows) if rows else torch.zeros(1, dtype=torch.float64)
    return torch.linalg.vector_norm(wide)


def grad_norm(model: nn.Module, sharding: Sharding) -> Tensor:
    """Return ‖g‖₂ over the gradients of the full model, each slice counted once; a float64 scalar
    with the same bits on every rank. 0 without gradients."""
    mesh = sharding.mesh
    grads = [
        to_local(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None and (mesh.size == 1 or sharding.placements[name].first)
    ]
    norm = total_norm(grads)
    if mesh.size == 1:
        return norm
    return sum_over(mesh.world, norm.to(mesh.device).square(), mesh, "norm").sqrt()


def global_stats(
    routes: Sequence[RouteStats], sums: Tensor, sharding: Sharding, reads_token: bool
) -> tuple[list[RouteStats], Tensor]:
    """Return statistics of all heads over the global batch, and `sums` (float64 `[n]`) summed over
    the ranks: one all-reduce for everything that a step reports. Counts are summed (exactly: in
    float64), the rest is averaged over the ranks that routed tokens of a head."""
    mesh = sharding.mesh
    if mesh.size == 1:
        return list(routes), sums
    heads_are_split = mesh.hp.size > 1 and not reads_token
    hp = mesh.hp.size if heads_are_split else 1
    weight = hp / mesh.size  # of one rank in a mean over the ranks that hold its heads

    def place(x: Tensor) -> Tensor:
        """Map `[H_local, …]` to `[H, …]` with zeros for the other heads."""
        if not heads_are_split or x.dim() == 0:
            return x
        all_heads = x.new_zeros(hp, *x.shape)
        all_heads[mesh.hp.index] = x
        return all_heads.flatten(0, 1)

    parts: list[Tensor] = []
    for route in routes:
        for name, value in route._asdict().items():
            if value is not None:
                scale = 1.0 if name in SUMMED else weight if value.dim() else 1 / mesh.size
                parts.append(place(value.detach().double() * scale))
    flat = torch.cat([sums.to(mesh.device), *(p.flatten() for p in parts)])
    sum_over(mesh.world, flat, mesh, "statistics")
    totals = iter(flat[len(sums) :].split([p.numel() for p in parts]))
    shapes = iter(parts)
    global_routes = []
    for route in routes:
        values = {
            name: None if value is None else next(totals).view_as(next(shapes)).to(value.dtype)
            for name, value in route._asdict().items()
        }
        global_routes.append(RouteStats(**values))  # type: ignore[arg-type]
    return global_routes, flat[: len(sums)]


def ring_bytes(x: Tensor, axis: Axis) -> int:
    """Return what a ring all-reduce sends: x/P, P−1 times to sum and P−1 times to distribute it."""
    return 2 * (axis.size - 1) * x.nbytes // axis.size


def _grad(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad
