"""Overlap in a sparse layer: a simulation of one rank that computes and exchanges.

The program of a rank is that of `model.moe.MoE.forward` with a dispatcher: the chunks take turns,
each runs to its next exchange. An exchange starts and is waited for where the code does so, so
overlap is simulated, not assumed; backward is the program in reverse. With two chunks:

    processor  route 0 │ route 1 │ experts 0      │ experts 1      │ merge 0 │ merge 1
    network            │ dispatch 0 │ dispatch 1  │ combine 0      │ combine 1 │

There are two resources:

- the processor, which computes or waits. Where it moves the bytes itself (gloo), exchanges in
  flight take their share of its time;
- the network. Exchanges are serialised, or share it at the measured speed of two concurrent ones.
  The exchange of counts waits in the same queue, and the host waits for it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["scatter", "dispatch", "combine", "gather"]
AT_ONCE = 2
"""Threads of gloo."""


@dataclass(frozen=True)
class Message:
    """One exchange of one chunk."""

    axis: str
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


@dataclass(frozen=True)
class Counts:
    """Exchange the numbers of permuted tokens, forward only; the host waits."""


Op = Work | Start | Wait | Counts
NOTHING = Work(0.0, 0.0)


@dataclass(frozen=True)
class Layer:
    """Seconds of a sparse layer for the tokens of one pass, all chunks together."""

    split: Work
    router: Work
    shared: Work
    experts: Work
    merge: Work
    copies_before: Mapping[Kind, Work]
    """Permuting and packing before an exchange. Only the exchanges named here happen."""
    copies_after: Mapping[Kind, Work]
    """Unpacking and summing after it."""
    early_route: bool
    """Whether the router reads the token, so that it runs before heads are scattered."""


def program(layer: Layer, chunks: int, counts: bool) -> list[Op]:
    """Return the forward pass in the order of `model.moe.MoE.forward`: each chunk runs until it
    has issued an exchange, then the next one does."""
    segments = [_segments(layer, chunk, chunks, counts) for chunk in range(chunks)]
    turns = [[op for ops in turn for op in ops] for turn in zip(*segments, strict=True)]
    return [*turns[0], layer.shared, *(op for turn in turns[1:] for op in turn)]


def _segments(layer: Layer, chunk: int, chunks: int, counts: bool) -> list[list[Op]]:
    """Return the program of one chunk, split where it waits."""
    segments: list[list[Op]] = [[]]

    def exchange(kind: Kind) -> None:
        if kind in layer.copies_before:
            segments[-1] += [layer.copies_before[kind] / chunks, Start(kind, chunk)]
            segments.append([Wait(kind, chunk), layer.copies_after[kind] / chunks])

    segments[-1] += [layer.split / chunks, layer.router / chunks if layer.early_route else NOTHING]
    exchange("scatter")
    segments[-1].append(NOTHING if layer.early_route else layer.router / chunks)
    if counts:
        segments[-1].append(Counts())
    exchange("dispatch")
    segments[-1].append(layer.experts / chunks)
    exchange("combine")
    exchange("gather")
    segments[-1].append(layer.merge / chunks)
    return segments


def reverse(ops: list[Op]) -> Iterator[Op]:
    """Yield the backward pass: the exchange of a gradient starts where forward waits for the
    exchange, and is waited for where forward starts it (`parallel.collectives`)."""
    for op in reversed(ops):
        match op:
            case Work(_, backward):
                yield Work(backward, 0.0)
            case Start(kind, chunk):
                yield Wait(kind, chunk)
            case Wait(kind, chunk):
                yield Start(kind, chunk)
            case Counts():
                pass


def exposed(
    ops: list[Op],
    forward: Mapping[Kind, Message],
    backward: Mapping[Kind, Message],
    counts: Message,
) -> dict[str, float]:
    """Return axis → seconds that a layer takes beyond its work, forward and backward.

    `forward` and `backward` are the exchanges of one chunk in either pass.
    """
    exposed_by_axis: dict[str, float] = defaultdict(float)
    for direction, messages in ((ops, forward), (reverse(ops), backward)):
        rank = _Rank()
        for op in direction:
            match op:
                case Work(seconds, _):
                    rank.work(seconds)
                case Start(kind, chunk):
                    rank.start((kind, chunk), messages[kind])
                case Wait(kind, chunk):
                    rank.wait((kind, chunk))
                case Counts():
                    rank.start(None, counts)
                    rank.wait(None)
        for axis, seconds in rank.exposed.items():
            exposed_by_axis[axis] += seconds
    return exposed_by_axis


@dataclass
class _Transfer:
    key: object
    message: Message
    remaining: float
    """Seconds that it still takes with nothing else in flight."""


class _Rank:
    """A rank whose clock advances from one event to the next."""

    def __init__(self) -> None:
        self.in_flight: list[_Transfer] = []
        self.exposed: dict[str, float] = defaultdict(float)

    def start(self, key: object, message: Message) -> None:
        """Queue an exchange behind those in flight."""
        self.in_flight.append(_Transfer(key, message, message.seconds))

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

    def wait(self, key: object) -> None:
        """Advance the clock until the exchange has completed."""
        while any(f.key == key for f in self.in_flight):
            took = self._next_completion()
            self.exposed[next(f for f in self.in_flight if f.key == key).message.axis] += took
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
        if not self.in_flight:
            return
        completion = self._next_completion()
        for transfer, speed in self._active():
            transfer.remaining -= seconds * speed
            if (
                seconds >= completion
                and transfer.remaining <= 1e-12 + 1e-9 * transfer.message.seconds
            ):
                transfer.remaining = 0.0
        self.in_flight = [f for f in self.in_flight if f.remaining > 0]
