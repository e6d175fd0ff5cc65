"""Seconds of a collective on one axis of a mesh: two numbers of a machine, or what was measured.

An exchange (all-to-all) of n bytes that leave a rank takes n / bandwidth + latency·(P−1), a ring
(all-reduce) n / bandwidth + latency·2·(P−1). Where `headway doctor --measure` has measured
collectives of several sizes, their times are interpolated instead: small messages pass at another
rate than large ones (switches and token buckets let bursts through, TCP loses more of a long
exchange). What an exchange costs the processor beside which it travels is measured on its own.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Collective = Literal["all_to_all", "all_reduce", "overlap_cost"]
"""`overlap_cost`: the time that an all-to-all adds to longer work that overlaps it."""


@dataclass(frozen=True)
class Curve:
    """Measured times of one collective on P ranks."""

    collective: Collective
    ranks: int
    inside: bool
    """Whether all of them were in one node."""
    at_once: int
    """Collectives that were under way at the same time."""
    points: tuple[tuple[float, float], ...]
    """(bytes that leave a rank, seconds) of all of them together, by bytes."""

    def seconds(self, n_bytes: float) -> float:
        """Straight lines between the points and beyond the last; the first point is the least."""
        points = self.points
        if n_bytes <= points[0][0] or len(points) == 1:
            return points[0][1]
        after = next((i for i, (n, _) in enumerate(points) if n >= n_bytes), len(points) - 1)
        (n0, t0), (n1, t1) = points[after - 1], points[after]
        return t0 + (t1 - t0) * (n_bytes - n0) / (n1 - n0)


def curve(values: dict[str, Any]) -> Curve:
    """Of a machine file. ValueError, TypeError or KeyError where it is none."""
    points = tuple((float(n), float(t)) for n, t in values["points"])
    rising = all(a[0] < b[0] for a, b in itertools.pairwise(points))
    if not points or not rising or any(t <= 0 for _, t in points):
        raise ValueError("points must be (bytes, seconds), rising bytes and seconds above 0")
    return Curve(
        values["collective"],
        int(values["ranks"]),
        bool(values["inside"]),
        int(values["at_once"]),
        points,
    )


class Rates(NamedTuple):
    """Two numbers in place of curves."""

    bandwidth: float
    """Bytes/s that leave a rank."""
    latency: float
    """Seconds per message."""


@dataclass(frozen=True)
class Link:
    """How the P ranks of an axis are connected."""

    ranks: int
    inside: bool
    """Whether every group of the axis lies in one node."""
    rates: Rates
    within: Rates
    """The same within a node."""
    curves: Sequence[Curve] = ()
    cpu_driven: bool = False
    """Whether the processor that computes moves the bytes too (gloo), and no engine of its own."""

    def exchange(self, n_bytes: float, busiest: float = 0.0) -> float:
        """An all-to-all in which `n_bytes` leave a rank on average, and through the fullest link,
        in one of its directions, `busiest`."""
        curve = self._curve("all_to_all", 1)
        if curve is not None:
            return self._measured(curve, n_bytes, busiest)
        most = max(n_bytes, busiest)
        return most / self.rates.bandwidth + (self.ranks - 1) * self.rates.latency

    def work(self, n_bytes: float) -> float:
        """Of the processor, for such an exchange: what was measured within a node, where no link
        limits it; else all of its time there where the processor moves the bytes, and none where
        engines do."""
        alone = Link(self.ranks, True, self.within, self.within, self.curves)
        curve = alone._curve("overlap_cost", 1)
        if curve is not None:
            return curve.seconds(n_bytes)
        return alone.exchange(n_bytes) if self.cpu_driven else 0.0

    def together(self, n_bytes: float, busiest: float = 0.0) -> float:
        """How fast each of two such exchanges goes that are under way at once, over the speed of
        one alone; 0 where nothing was measured: then they take turns."""
        curve = self._curve("all_to_all", 2)
        if curve is None:
            return 0.0
        return self.exchange(n_bytes, busiest) / self._measured(curve, 2 * n_bytes, 2 * busiest)

    def ring(self, n_bytes: float) -> float:
        """An all-reduce in which `n_bytes` leave a rank."""
        curve = self._curve("all_reduce", 1)
        if curve is not None:
            return curve.seconds(n_bytes)
        return n_bytes / self.rates.bandwidth + 2 * (self.ranks - 1) * self.rates.latency

    def ring_work(self, n_bytes: float) -> float:
        """Of the processor, for an all-reduce: all of its time within a node where the processor
        moves the bytes."""
        alone = Link(self.ranks, True, self.within, self.within, self.curves)
        return alone.ring(n_bytes) if self.cpu_driven else 0.0

    def _measured(self, curve: Curve, n_bytes: float, busiest: float) -> float:
        """Where the load is uneven one link is full, and what crosses it has it for itself."""
        even = curve.seconds(n_bytes)
        return max(even, self.ring(busiest)) if busiest > n_bytes else even

    def _curve(self, collective: Collective, at_once: int) -> Curve | None:
        """The one that was measured on the most similar number of ranks."""
        fitting = [
            c
            for c in self.curves
            if (c.collective, c.at_once, c.inside) == (collective, at_once, self.inside)
        ]
        return min(fitting, key=lambda c: abs(math.log(c.ranks / self.ranks)), default=None)
