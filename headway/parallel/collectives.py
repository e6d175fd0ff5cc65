"""Collectives that travel while something else is computed, with gradients, counted.

Each function issues an `AsyncCollective`; `wait()` returns the tensors. Backward is the same in
reverse: the backward of `wait` starts the adjoint collective and the backward of the start waits
for it, so what lay between the two in forward hides the way back as well.

P ranks on the axis · N rows. Several tensors of the same rows travel as one message, row by row.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from headway.parallel import p2p as pairwise
from headway.parallel.fp8 import narrow, widen
from headway.parallel.mesh import Axis
from headway.parallel.traffic import Traffic


class Splits(NamedTuple):
    """Rows that this rank sends to each rank of an axis, and receives from each."""

    send: list[int]
    receive: list[int]

    def swapped(self) -> "Splits":
        """Of the way back."""
        return Splits(self.receive, self.send)


class CommContext(NamedTuple):
    """An axis and where its bytes are counted."""

    axis: Axis
    traffic: Traffic
    purpose: str
    layer: int | None = None
    """Whose exchange it is; None for one that belongs to no layer."""
    float8: bool = False
    """The first tensor of a message, the sub-tokens, travels as `parallel.float8` makes it."""

    def add(self, n_bytes: int) -> None:
        """Counts a collective that begins."""
        self.traffic.add(self.axis.name, self.purpose, n_bytes, self.layer)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time that the host stands still in the body."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.traffic.waited(self.axis.name, self.purpose, seconds, self.layer)

    def back(self) -> "CommContext":
        """The same for the gradients."""
        return self._replace(purpose=f"{self.purpose} backward")


class _Message(NamedTuple):
    """One collective under way."""

    wire: CommContext
    received: Tensor
    posted: pairwise.Posted

    def land(self) -> Tensor:
        """Wait for it."""
        with self.wire.waiting():
            self.posted.wait()
        return self.received


class _CollectiveSpec(NamedTuple):
    """A collective, and whether its parts `[P·N, …]` are summed over the ranks on arrival."""

    send: Callable[[Tensor, CommContext], _Message]
    sums: bool = False


def _exchange(splits: Splits | None) -> Callable[[Tensor, CommContext], _Message]:
    """All-to-all of rows; `None` sends the same number to everyone."""

    def send(x: Tensor, wire: CommContext) -> _Message:
        x = x.contiguous()
        n, axis = x.shape[0], wire.axis
        received = x.new_empty(n if splits is None else sum(splits.receive), *x.shape[1:])
        stays = n // axis.size if splits is None else splits.send[axis.index]
        wire.add((n - stays) * _row_bytes(x))
        sizes = (None, None) if splits is None else (splits.receive, splits.send)
        return _Message(wire, received, pairwise.all_to_all(received, x, axis, *sizes))

    return send


def _collect(x: Tensor, wire: CommContext) -> _Message:
    """All-gather `[N, …]` → `[P·N, …]`."""
    x, axis = x.contiguous(), wire.axis
    received = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    wire.add((axis.size - 1) * x.shape[0] * _row_bytes(x))
    return _Message(wire, received, pairwise.all_gather(received, x, axis))


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _dense(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


class _Packing:
    """How several tensors `[N, …]` lie in the rows of one message."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.kinds = [(p.dtype, p.shape[1:]) for p in parts]
        self.bytes = [math.prod(shape) * dtype.itemsize for dtype, shape in self.kinds]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """A single tensor goes as it is; several as `[N, bytes]`."""
        if len(parts) == 1:
            return parts[0]
        n = parts[0].shape[0]
        rows = torch.empty(n, sum(self.bytes), dtype=torch.uint8, device=parts[0].device)
        for piece, part in zip(rows.split(self.bytes, 1), parts, strict=True):
            piece.copy_(_dense(part.reshape(n, math.prod(part.shape[1:]))).view(torch.uint8))
        return rows

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The inverse."""
        if len(self.kinds) == 1:
            return (rows,)
        return tuple(
            # a clone, since a piece of no rows or one is "contiguous" with the wide row's stride
            _dense(piece).view(dtype).view(rows.shape[0], *shape)
            for piece, (dtype, shape) in zip(rows.split(self.bytes, 1), self.kinds, strict=True)
        )


class AsyncCollective:
    """Tensors on their way; `wait` brings them in."""

    def __init__(
        self, wire: CommContext, forward: _CollectiveSpec, adjoint: _CollectiveSpec
    ) -> None:
        self.wire, self.forward, self.adjoint = wire, forward, adjoint
        self.message: _Message | None = None
        self.layout = _Packing(())
        self.dtype = torch.float32
        self.token = torch.empty(0)

    def depart(self, parts: Sequence[Tensor], way: _CollectiveSpec, wire: CommContext) -> None:
        """Start a collective, in either direction."""
        assert self.message is None
        self.dtype = parts[0].dtype
        if wire.float8:
            parts = (*narrow(parts[0]), *parts[1:])
        self.layout = _Packing(parts)
        self.message = way.send(self.layout.pack(parts), wire)

    def arrive(self, way: _CollectiveSpec) -> tuple[Tensor, ...]:
        """What it brought."""
        assert self.message is not None
        parts = self.layout.unpack(self.message.land())
        self.message = None
        if self.wire.float8:
            parts = (widen(parts[0], parts[1], self.dtype), *parts[2:])
        return tuple(_rank_sum(p, self.wire.axis.size) for p in parts) if way.sums else parts

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, in the order in which they were sent."""
        # autograd keeps the flight, so the flight must not keep the token and autograd with it
        token, self.token = self.token, torch.empty(0)
        return _Complete.apply(self, token)  # type: ignore[return-value]


def _rank_sum(received: Tensor, size: int) -> Tensor:
    """Σ over the ranks in rank order, so that it does not matter who was first; in float32."""
    wide = torch.float64 if received.dtype == torch.float64 else torch.float32
    return received.unflatten(0, (size, -1)).sum(0, dtype=wide).to(received.dtype)


class _Issue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flight: AsyncCollective, *parts: Tensor) -> Tensor:  # type: ignore[override]
        flight.depart(parts, flight.forward, flight.wire)
        ctx.flight, ctx.floating = flight, [p.is_floating_point() for p in parts]
        return parts[0].new_empty(0)  # ties the two ends together for autograd

    @staticmethod
    def backward(ctx, *_: Tensor):  # type: ignore[override]
        found = iter(ctx.flight.arrive(ctx.flight.adjoint))
        return None, *(next(found) if floating else None for floating in ctx.floating)


class _Complete(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flight: AsyncCollective, token: Tensor):  # type: ignore[override]
        parts = flight.arrive(flight.forward)
        ctx.flight, ctx.floating = flight, [p.is_floating_point() for p in parts]
        ctx.mark_non_differentiable(*(p for p in parts if not p.is_floating_point()))
        return parts

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        flight: AsyncCollective = ctx.flight
        wanted = [g for g, floating in zip(grads, ctx.floating, strict=True) if floating]
        flight.depart(wanted, flight.adjoint, flight.wire.back())
        return None, wanted[0].new_empty(0)


def _start(flight: AsyncCollective, parts: Sequence[Tensor]) -> AsyncCollective:
    flight.token = _Issue.apply(flight, *parts)  # type: ignore[assignment]
    return flight


def all_to_all(
    parts: Sequence[Tensor], wire: CommContext, splits: Splits | None = None
) -> AsyncCollective:
    """Rows `[N, …]` to their ranks, in rank order; equal numbers without `splits`.

    Integer tensors travel along and take no gradient.
    """
    back = None if splits is None else splits.swapped()
    return _start(
        AsyncCollective(wire, _CollectiveSpec(_exchange(splits)), _CollectiveSpec(_exchange(back))),
        parts,
    )


def all_gather(parts: Sequence[Tensor], wire: CommContext) -> AsyncCollective:
    """`[N, …]` → `[P·N, …]` on every rank. Backward sums over the ranks."""
    return _start(
        AsyncCollective(
            wire, _CollectiveSpec(_collect), _CollectiveSpec(_exchange(None), sums=True)
        ),
        parts,
    )


def reduce_scatter(part: Tensor, wire: CommContext) -> AsyncCollective:
    """`[P·N, …]` → `[N, …]`, the sum over the ranks: an all-to-all, which sends what a ring would
    send, and one sum in rank order. Backward gathers."""
    return _start(
        AsyncCollective(
            wire, _CollectiveSpec(_exchange(None), sums=True), _CollectiveSpec(_collect)
        ),
        (part,),
    )


def exchange_counts(send_P: Tensor, wire: CommContext) -> Splits:
    """Tells every rank how many rows it will get: int64 `[P]` there and back, and one wait for the
    device, since the sizes of what follows must be known."""
    axis = wire.axis
    receive_P = torch.empty_like(send_P)
    wire.add((axis.size - 1) * send_P.element_size())
    with wire.waiting():
        pairwise.all_to_all(receive_P, send_P, axis).wait()
        both = torch.stack([send_P, receive_P]).tolist()
    return Splits(both[0], both[1])


def index_dtype(n: int) -> torch.dtype:
    """The narrowest type on the wire that holds 0 … n."""
    return torch.int16 if n < 2**15 else torch.int32
