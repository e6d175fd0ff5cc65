"""Asynchronous collectives with gradients: communication overlaps with computation, both ways.

Each function issues an `AsyncCollective`; `wait()` completes it and returns the tensors. Autograd
sees two nodes, and the backward of the one is the issue of the other:

    forward     parts ─▶ _Issue ── token ──▶ _Complete ─▶ received      between the two nodes
                         issue               complete                   other chunks compute
    backward    grads ◀─ _Issue ◀─ token ─── _Complete ◀─ grads         and so does their backward
                         complete            issue the adjoint

`token` is an empty tensor. It is the only edge between the nodes: without it autograd would not
know that `_Complete` comes from `_Issue`, and no gradient would reach `parts`. Both nodes keep the
`AsyncCollective` (`ctx.collective`); if that kept the token, which keeps the graph, there would be
a ring `collective → token → _Issue → collective`. Python's garbage collector does not see the links
inside autograd, so a step's whole graph would leak. `wait` therefore drops the token.

P ranks on the axis · N rows. Several tensors with the same rows are packed row by row into one
message."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from headway.parallel import p2p
from headway.parallel.fp8 import narrow, widen
from headway.parallel.mesh import Axis
from headway.parallel.traffic import Traffic

T = TypeVar("T")


class Splits(NamedTuple):
    """Rows that this rank sends to each rank of an axis, and receives from each."""

    send: list[int]
    receive: list[int]

    def swapped(self) -> "Splits":
        """Return the splits of the inverse exchange."""
        return Splits(self.receive, self.send)


class CommContext(NamedTuple):
    """The axis of a collective, and under what its bytes are counted."""

    axis: Axis
    traffic: Traffic
    purpose: str
    layer: int | None = None
    """Index of the block that exchanges; None for what belongs to no block."""
    float8: bool = False
    """Whether the first tensor of a message, the sub-tokens, is sent in FP8 (`parallel.fp8`)."""

    def add(self, n_bytes: int) -> None:
        """Count a collective that is issued."""
        self.traffic.add(self.axis.name, self.purpose, n_bytes, self.layer)

    def waiting(self) -> AbstractContextManager[None]:
        """Return a context that counts the time that its body blocks the host."""
        return self.traffic.waiting(self.axis.name, self.purpose, self.layer)

    def backward(self) -> "CommContext":
        """Return the context of the collective of the gradients."""
        return self._replace(purpose=f"{self.purpose} backward")


class _Pending(NamedTuple):
    """A collective that has been issued."""

    comm: CommContext
    received: Tensor
    works: p2p.Works

    def wait(self) -> Tensor:
        """Block until it is complete; return what was received."""
        with self.comm.waiting():
            self.works.wait()
        return self.received


class _CollectiveSpec(NamedTuple):
    """Which collective to issue, and whether its `[P·N, …]` are then summed over the ranks."""

    issue: Callable[[Tensor, CommContext], _Pending]
    sums: bool = False


def _issue_all_to_all(splits: Splits | None) -> Callable[[Tensor, CommContext], _Pending]:
    """All-to-all of rows; `None` sends equally many to every rank."""

    def issue(x: Tensor, comm: CommContext) -> _Pending:
        x = x.contiguous()
        n, axis = x.shape[0], comm.axis
        received = x.new_empty(n if splits is None else sum(splits.receive), *x.shape[1:])
        n_local = n // axis.size if splits is None else splits.send[axis.index]
        comm.add((n - n_local) * _row_bytes(x))
        sizes = (None, None) if splits is None else (splits.receive, splits.send)
        return _Pending(comm, received, p2p.all_to_all(received, x, axis, *sizes))

    return issue


def _issue_all_gather(x: Tensor, comm: CommContext) -> _Pending:
    """All-gather `[N, …]` → `[P·N, …]`."""
    x, axis = x.contiguous(), comm.axis
    received = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    comm.add((axis.size - 1) * x.shape[0] * _row_bytes(x))
    return _Pending(comm, received, p2p.all_gather(received, x, axis))


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _contiguous_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


class _Packing:
    """How several tensors `[N, …]` are packed into the rows of one message `[N, bytes]`."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.kinds = [(p.dtype, p.shape[1:]) for p in parts]
        self.bytes = [math.prod(shape) * dtype.itemsize for dtype, shape in self.kinds]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Return a single tensor as it is; several as uint8 `[N, bytes]`."""
        if len(parts) == 1:
            return parts[0]
        n = parts[0].shape[0]
        rows = torch.empty(n, sum(self.bytes), dtype=torch.uint8, device=parts[0].device)
        for columns, part in zip(rows.split(self.bytes, 1), parts, strict=True):
            flat = _contiguous_copy(part.reshape(n, math.prod(part.shape[1:])))
            columns.copy_(flat.view(torch.uint8))
        return rows

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of packed rows."""
        if len(self.kinds) == 1:
            return (rows,)
        return tuple(
            # copied, since columns of no rows or one are "contiguous" with the stride of the row
            _contiguous_copy(columns).view(dtype).view(rows.shape[0], *shape)
            for columns, (dtype, shape) in zip(rows.split(self.bytes, 1), self.kinds, strict=True)
        )


class AsyncCollective:
    """Handle of a collective that has been issued; `wait` completes it."""

    def __init__(
        self,
        parts: Sequence[Tensor],
        comm: CommContext,
        forward: _CollectiveSpec,
        adjoint: _CollectiveSpec,
    ) -> None:
        self.comm, self.forward, self.adjoint = comm, forward, adjoint
        self.pending: _Pending | None = None
        self.token: Tensor = _Issue.apply(self, *parts)  # type: ignore[assignment]

    def issue(self, parts: Sequence[Tensor], spec: _CollectiveSpec, comm: CommContext) -> None:
        """Start a collective: the forward one or its adjoint."""
        assert self.pending is None
        self.dtype = parts[0].dtype
        if comm.float8:
            parts = (*narrow(parts[0]), *parts[1:])
        self.packing = _Packing(parts)
        self.pending = spec.issue(self.packing.pack(parts), comm)

    def complete(self, spec: _CollectiveSpec) -> tuple[Tensor, ...]:
        """Block until the collective is complete; return the tensors that were received."""
        assert self.pending is not None
        parts = self.packing.unpack(self.pending.wait())
        self.pending = None
        if self.comm.float8:
            parts = (widen(parts[0], parts[1], self.dtype), *parts[2:])
        return tuple(_rank_sum(p, self.comm.axis.size) for p in parts) if spec.sums else parts

    def wait(self) -> tuple[Tensor, ...]:
        """Block until complete; return the tensors in the order in which they were sent."""
        token, self.token = self.token, torch.empty(0)  # breaks the ring, see above
        return _Complete.apply(self, token)  # type: ignore[return-value]

    def then(self, function: Callable[..., T]) -> "_Then[T]":
        """Return a handle whose `wait` returns `function(*tensors)` of what was received."""
        return _Then(self, function)


@dataclass(frozen=True)
class _Then(Generic[T]):
    collective: AsyncCollective
    function: Callable[..., T]

    def wait(self) -> T:
        return self.function(*self.collective.wait())


def _rank_sum(received: Tensor, size: int) -> Tensor:
    """Return Σ over the ranks, in float32 and in rank order, so that the order in which messages
    come in does not matter."""
    wide = torch.float64 if received.dtype == torch.float64 else torch.float32
    return received.unflatten(0, (size, -1)).sum(0, dtype=wide).to(received.dtype)


class _Issue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, collective: AsyncCollective, *parts: Tensor) -> Tensor:  # type: ignore[override]
        collective.issue(parts, collective.forward, collective.comm)
        ctx.collective, ctx.floating = collective, [p.is_floating_point() for p in parts]
        return parts[0].new_empty(0)  # the token

    @staticmethod
    def backward(ctx, *_: Tensor):  # type: ignore[override]
        grads = iter(ctx.collective.complete(ctx.collective.adjoint))
        return None, *(next(grads) if floating else None for floating in ctx.floating)


class _Complete(torch.autograd.Function):
    @staticmethod
    def forward(ctx, collective: AsyncCollective, token: Tensor):  # type: ignore[override]
        parts = collective.complete(collective.forward)
        ctx.collective, ctx.floating = collective, [p.is_floating_point() for p in parts]
        ctx.mark_non_differentiable(*(p for p in parts if not p.is_floating_point()))
        return parts

    @staticmethod
    def backward(ctx, *all_grads: Tensor):  # type: ignore[override]
        collective: AsyncCollective = ctx.collective
        grads = [g for g, floating in zip(all_grads, ctx.floating, strict=True) if floating]
        collective.issue(grads, collective.adjoint, collective.comm.backward())
        return None, grads[0].new_empty(0)


def all_to_all(
    parts: Sequence[Tensor], comm: CommContext, splits: Splits | None = None
) -> AsyncCollective:
    """Send rows `[N, …]` to their ranks, in rank order; equally many to each without `splits`.
    Integer tensors are sent along and get no gradient."""
    inverse = None if splits is None else splits.swapped()
    forward, adjoint = _issue_all_to_all(splits), _issue_all_to_all(inverse)
    return AsyncCollective(parts, comm, _CollectiveSpec(forward), _CollectiveSpec(adjoint))


def all_gather(parts: Sequence[Tensor], comm: CommContext) -> AsyncCollective:
    """Map `[N, …]` to `[P·N, …]` on every rank. The gradients are summed over the ranks."""
    adjoint = _CollectiveSpec(_issue_all_to_all(None), sums=True)
    return AsyncCollective(parts, comm, _CollectiveSpec(_issue_all_gather), adjoint)


def reduce_scatter(part: Tensor, comm: CommContext) -> AsyncCollective:
    """Map `[P·N, …]` to `[N, …]`, the sum over the ranks: an all-to-all, which sends as many bytes
    as a ring would, and one sum in rank order. The gradients are all-gathered."""
    forward = _CollectiveSpec(_issue_all_to_all(None), sums=True)
    return AsyncCollective((part,), comm, forward, _CollectiveSpec(_issue_all_gather))


def exchange_counts(send_P: Tensor, comm: CommContext) -> Splits:
    """Tell every rank how many rows it will receive: int64 `[P]` to `[P]`. It waits for the device,
    since the sizes of the next collective must be known to the host."""
    axis = comm.axis
    receive_P = torch.empty_like(send_P)
    comm.add((axis.size - 1) * send_P.element_size())
    with comm.waiting():
        p2p.all_to_all(receive_P, send_P, axis).wait()
        send, receive = torch.stack([send_P, receive_P]).tolist()
    return Splits(send, receive)


def index_dtype(n: int) -> torch.dtype:
    """Return the narrowest integer dtype that holds 0 … n, for sending indices."""
    return torch.int16 if n < 2**15 else torch.int32
