"""What overlaps in a sparse layer: a simulation of one rank that computes and exchanges.

The program of a rank is that of `model.moe.MoE.forward` with `ranks`: leg after leg, each chunk
after chunk. An exchange starts where the code starts it and is waited for where the code waits, so
overlap is found, not assumed; backward is the program in reverse. Two resources:

- the processor, which works or waits. Where it moves the bytes itself (gloo), exchanges under way
  take their share of its time;
- the network. Exchanges take turns, or where two at once were measured share it at that speed. The
  exchange of counts waits in the same queue, and the host waits for it.
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
    """Alone."""
    together: float = 0.0
    """Speed of each of two at once; 0: they take turns."""
    share: float = 0.0
    """Of the processor's time, while it is under way alone."""


@dataclass(frozen=True)
class Work:
    """Seconds of computing in forward and in backward."""

    forward: float
    backward: float

    def __truediv__(self, n: int) -> "Work":
        return Work(self.forward / n, self.backward / n)


@dataclass(frozen=True)
class Start:
    """An exchange begins."""

    kind: Kind
    chunk: int


@dataclass(frozen=True)
class Wait:
    """Its bytes are needed."""

    kind: Kind
    chunk: int


@dataclass(frozen=True)
class Counts:
    """Ranks tell each other how many rows will come, forward only."""


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
    departing: Mapping[Kind, Work]
    """Rows are gathered and packed before an exchange. Only the exchanges named here happen."""
    arriving: Mapping[Kind, Work]
    """They are unpacked and summed after it."""
    early_route: bool
    """Whether the router reads the token, so that it runs before heads travel."""


def program(layer: Layer, chunks: int, counts: bool) -> list[Op]:
    """The forward pass, in the order of `model.moe.MoE.forward`: every chunk goes on until
    something travels, then it is the next one's turn."""
    legs: list[list[list[Op]]] = [_legs(layer, chunk, chunks, counts) for chunk in range(chunks)]
    turns = [[op for ops in turn for op in ops] for turn in zip(*legs, strict=True)]
    return [*turns[0], layer.shared, *(op for turn in turns[1:] for op in turn)]


def _legs(layer: Layer, chunk: int, chunks: int, counts: bool) -> list[list[Op]]:
    """One chunk's way, cut where it waits."""
    legs: list[list[Op]] = [[]]

    def travel(kind: Kind) -> None:
        if kind in layer.departing:
            legs[-1] += [layer.departing[kind] / chunks, Start(kind, chunk)]
            legs.append([Wait(kind, chunk), layer.arriving[kind] / chunks])

    legs[-1] += [layer.split / chunks, layer.router / chunks if layer.early_route else NOTHING]
    travel("scatter")
    legs[-1].append(NOTHING if layer.early_route else layer.router / chunks)
    if counts:
        legs[-1].append(Counts())
    travel("dispatch")
    legs[-1].append(layer.experts / chunks)
    travel("combine")
    travel("gather")
    legs[-1].append(layer.merge / chunks)
    return legs


def reverse(ops: list[Op]) -> Iterator[Op]:
    """Backward: where forward waits for an exchange its gradient's starts, and the other way round
    (`parallel.collectives`)."""
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
    there: Mapping[Kind, Message],
    back: Mapping[Kind, Message],
    counts: Message,
) -> dict[str, float]:
    """Axis → seconds that a layer takes beyond its work, forward and backward.

    `there` and `back` are the exchanges of one chunk in forward and in backward.
    """
    found: dict[str, float] = defaultdict(float)
    for direction, messages in ((ops, there), (reverse(ops), back)):
        rank = _Rank()
        for op in direction:
            match op:
                case Work(forward, _):
                    rank.work(forward)
                case Start(kind, chunk):
                    rank.start((kind, chunk), messages[kind])
                case Wait(kind, chunk):
                    rank.wait((kind, chunk))
                case Counts():
                    rank.start(None, counts)
                    rank.wait(None)
        for axis, seconds in rank.exposed.items():
            found[axis] += seconds
    return found


@dataclass
class _Flight:
    key: object
    message: Message
    left: float
    """Seconds alone."""


class _Rank:
    """A clock that runs from one event to the next."""

    def __init__(self) -> None:
        self.flights: list[_Flight] = []
        self.exposed: dict[str, float] = defaultdict(float)

    def start(self, key: object, message: Message) -> None:
        """Behind those that are under way."""
        self.flights.append(_Flight(key, message, message.seconds))

    def work(self, seconds: float) -> None:
        """Computes, beside what is under way."""
        while seconds > 0:
            busy = sum(f.message.share * speed for f, speed in self._moving())
            pace = max(1.0 - busy, 0.0)
            landing = self._landing()
            took = min(seconds / pace if pace else landing, landing)
            if self.flights:
                self.exposed[self.flights[0].message.axis] += took * (1 - pace)
            seconds = 0.0 if took < landing else seconds - took * pace
            self._pass(took)

    def wait(self, key: object) -> None:
        """Stands still until it is here."""
        while any(f.key == key for f in self.flights):
            took = self._landing()
            self.exposed[next(f for f in self.flights if f.key == key).message.axis] += took
            self._pass(took)

    def _moving(self) -> list[tuple[_Flight, float]]:
        first = self.flights[:AT_ONCE]
        if len(first) == AT_ONCE and all(f.message.together for f in first):
            return [(f, f.message.together) for f in first]
        return [(f, 1.0) for f in first[:1]]

    def _landing(self) -> float:
        """Seconds until the next one is here."""
        return min((f.left / speed for f, speed in self._moving()), default=float("inf"))

    def _pass(self, seconds: float) -> None:
        if not self.flights:
            return
        landing = self._landing()
        for flight, speed in self._moving():
            flight.left -= seconds * speed
            if seconds >= landing and flight.left <= 1e-12 + 1e-9 * flight.message.seconds:
                flight.left = 0.0
        self.flights = [f for f in self.flights if f.left > 0]
