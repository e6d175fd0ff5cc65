"""Overlap in a sparse layer: a simulation of one rank that computes and exchanges.

The program of a rank is that of `model.moe.SparseLayer.forward` with a dispatcher: the chunks take
turns, each runs to its next exchange. An exchange starts and is waited for where the code does so,
so overlap is simulated, not assumed; backward is the program in reverse. With two chunks:

    processor  route 0 │ route 1 │ experts 0      │ experts 1      │ merge 0 │ merge 1
    network            │ dispatch 0 │ dispatch 1  │ combine 0      │ combine 1 │

There are two resources:

- the processor, which computes or waits. Where it moves the bytes itself (gloo), exchanges in
  flight take their share of its time;
- the network. Exchanges are serialised, or share it at the measured speed of two concurrent ones.
  The exchange of counts waits in the same queue, and the host waits for it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from headway.plan.layout import AxisName

Kind = Literal["scatter", "counts", "dispatch", "combine", "gather"]
"""`counts`: the numbers of permuted tokens, exchanged in forward only; the host waits for them."""
AT_ONCE = 2
"""Threads of gloo."""


@dataclass(frozen=True)
class Message:
    """One exchange of one chunk."""

    axis: AxisName
    seconds: float
    """Duration with nothing else in flight."""
    concurrent_speed: float = 0.0
    """Relative speed of each of two concurrent exchanges; 0: they are serialised."""
    share: float = 0.0
    """Share of the processor's time that it takes while it is alone in flight."""


@dataclass(frozen=True)
class Work:
    """Seconds of computation in forward and in backward."""

    forward: float
    backward: float

    def __truediv__(self, n: int) -> "Work":
        return Work(self.forward / n, self.backward / n)


NOTHING = Work(0.0, 0.0)


@dataclass(frozen=True)
class LayerExchange:
    """One of a layer's exchanges: its messages, and the copies of all chunks around it."""

    forward: Message
    backward: Message
    before: Work = NOTHING
    """Permuting and packing."""
    after: Work = NOTHING
    """Unpacking and summing."""


@dataclass(frozen=True)
class Start:
    """Issue an exchange."""

    kind: Kind
    chunk: int


@dataclass(frozen=True)
class Wait:
    """Block until an exchange has completed."""

    kind: Kind
    chunk: int


Op = Work | Start | Wait


@dataclass(frozen=True)
class Layer:
    """Seconds of a sparse layer for the tokens of one pass, all chunks together."""

    split: Work
    router: Work
    shared: Work
    experts: Work
    merge: Work
    early_route: bool
    """Whether the router reads the token, so that it runs before heads are scattered."""
    exchanges: Mapping[Kind, LayerExchange]
    """Only the exchanges named here happen."""


def program(layer: Layer, chunks: int) -> list[Op]:
    """Return the forward pass in the order of `model.moe.SparseLayer.forward`: each chunk runs
    until it has issued an exchange, then the next one does."""
    segments = [_segments(layer, chunk, chunks) for chunk in range(chunks)]
    turns = [[op for ops in turn for op in ops] for turn in zip(*segments, strict=True)]
    return [*turns[0], layer.shared, *(op for turn in turns[1:] for op in turn)]


def _segments(layer: Layer, chunk: int, chunks: int) -> list[list[Op]]:
    """Return the program of one chunk, split where it waits and others compute."""
    stages: list[Work | Kind] = [layer.split, "scatter", layer.router, "counts", "dispatch"]
    if layer.early_route:
        stages[1:3] = layer.router, "scatter"
    segments: list[list[Op]] = [[]]
    for stage in (*stages, layer.experts, "combine", "gather", layer.merge):
        if isinstance(stage, Work):
            segments[-1].append(stage / chunks)
        elif exchange := layer.exchanges.get(stage):
            segments[-1] += [exchange.before / chunks, Start(stage, chunk)]
            if stage != "counts":
                segments.append([])
            segments[-1] += [Wait(stage, chunk), exchange.after / chunks]
    return segments


def reverse(ops: list[Op]) -> Iterator[Op]:
    """Yield the backward pass: the exchange of a gradient starts where forward waits for the
    exchange, and is waited for where forward starts it (`parallel.collectives`)."""
    for op in reversed(ops):
        match op:
            case Work(_, backward):
                yield Work(backward, 0.0)
            case Start(kind, chunk) if kind != "counts":
                yield Wait(kind, chunk)
            case Wait(kind, chunk) if kind != "counts":
                yield Start(kind, chunk)


def exposed(layer: Layer, chunks: int) -> dict[AxisName, float]:
    """Return axis → seconds that a layer takes beyond its work, forward and backward."""
    exposed_by_axis: dict[AxisName, float] = defaultdict(float)
    forward = program(layer, chunks)
    for ops, is_forward in ((forward, True), (reverse(forward), False)):
        rank = _Rank()
        for op in ops:
            match op:
                case Work(seconds, _):
                    rank.work(seconds)
                case Start(kind, chunk):
                    exchange = layer.exchanges[kind]
                    message = exchange.forward if is_forward else exchange.backward
                    rank.in_flight.append(_Transfer(kind, chunk, message, message.seconds))
                case Wait(kind, chunk):
                    rank.wait(kind, chunk)
        for axis, seconds in rank.exposed.items():
            exposed_by_axis[axis] += seconds
    return exposed_by_axis


@dataclass
class _Transfer:
    kind: Kind
    chunk: int
    message: Message
    remaining: float
    """Seconds that it still takes with nothing else in flight."""


class _Rank:
    """A rank whose clock advances from one event to the next."""

    def __init__(self) -> None:
        self.in_flight: list[_Transfer] = []  # in the order of their start
        self.exposed: dict[AxisName, float] = defaultdict(float)

    def work(self, seconds: float) -> None:
        """Compute while exchanges are in flight."""
        while seconds > 0:
            busy = sum(f.message.share * speed for f, speed in self._active())
            pace = max(1.0 - busy, 0.0)
            completion = self._next_completion()
            took = min(seconds / pace if pace else completion, completion)
            if self.in_flight:
                self.exposed[self.in_flight[0].message.axis] += took * (1 - pace)
            seconds = 0.0 if took < completion else seconds - took * pace
            self._advance(took)

    def wait(self, kind: Kind, chunk: int) -> None:
        """Advance the clock until the exchange has completed."""
        while pending := [f for f in self.in_flight if (f.kind, f.chunk) == (kind, chunk)]:
            took = self._next_completion()
            self.exposed[pending[0].message.axis] += took
            self._advance(took)

    def _active(self) -> list[tuple[_Transfer, float]]:
        first = self.in_flight[:AT_ONCE]
        if len(first) == AT_ONCE and all(f.message.concurrent_speed for f in first):
            return [(f, f.message.concurrent_speed) for f in first]
        return [(f, 1.0) for f in first[:1]]

    def _next_completion(self) -> float:
        """Return the seconds until the next exchange completes."""
        return min((f.remaining / speed for f, speed in self._active()), default=float("inf"))

    def _advance(self, seconds: float) -> None:
        completes = seconds >= self._next_completion()
        for transfer, speed in self._active():
            transfer.remaining -= seconds * speed
            if completes and transfer.remaining <= 1e-12 + 1e-9 * transfer.message.seconds:
                transfer.remaining = 0.0
        self.in_flight = [f for f in self.in_flight if f.remaining > 0]
