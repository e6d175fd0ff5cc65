"""Seconds of a collective on one axis of a mesh: two numbers of a machine, or what was measured.

An all-to-all in which a rank sends n bytes takes n / bandwidth + latency·(P−1), a ring all-reduce n
/ bandwidth + latency·2·(P−1). Where `headway doctor --measure` has measured collectives of several
sizes, their times are interpolated instead, because small messages reach another rate than large
ones (switches and token buckets let bursts through, TCP loses more of a long exchange). The time
that an exchange takes from a processor that computes meanwhile is measured separately."""

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
    """Whether all ranks were in one node."""
    at_once: int
    """Collectives in flight at the same time."""
    points: tuple[tuple[float, float], ...]
    """(bytes that a rank sends, seconds) of all `at_once` collectives together, by bytes."""

    def seconds(self, n_bytes: float) -> float:
        """Interpolate linearly between the points and beyond the last; below the first point the
        time is that of the first."""
        points = self.points
        if n_bytes <= points[0][0] or len(points) == 1:
            return points[0][1]
        after = next((i for i, (n, _) in enumerate(points) if n >= n_bytes), len(points) - 1)
        (n0, t0), (n1, t1) = points[after - 1], points[after]
        return t0 + (t1 - t0) * (n_bytes - n0) / (n1 - n0)


def parse_curve(values: dict[str, Any]) -> Curve:
    """Return the curve of a machine file. Raises ValueError, TypeError or KeyError for damaged
    values."""
    points = tuple((float(n), float(t)) for n, t in values["points"])
    rising = all(a[0] < b[0] for a, b in itertools.pairwise(points))
    if not points or not rising or any(t <= 0 for _, t in points):
        raise ValueError("points must be (bytes, seconds), rising bytes and seconds above 0")
    ranks, at_once = int(values["ranks"]), int(values["at_once"])
    return Curve(values["collective"], ranks, bool(values["inside"]), at_once, points)


class Rates(NamedTuple):
    """Two numbers in place of curves."""

    bandwidth: float
    """Bytes/s that a rank sends."""
    latency: float
    """Seconds per message."""


@dataclass(frozen=True)
class Link:
    """How the P ranks of an axis are connected."""

    ranks: int
    inside: bool
    """Whether every group of the axis is within one node."""
    rates: Rates
    within: Rates
    """Rates between ranks of one node."""
    curves: Sequence[Curve] = ()
    cpu_driven: bool = False
    """Whether the processor that computes also moves the bytes (gloo), instead of a DMA engine."""

    def exchange(self, n_bytes: float, busiest: float = 0.0) -> float:
        """Return the seconds of an all-to-all in which a rank sends `n_bytes` on average and the
        most loaded link carries `busiest` bytes in one direction."""
        if curve := self._curve("all_to_all", 1):
            return self._measured(curve, n_bytes, busiest)
        most = max(n_bytes, busiest)
        return most / self.rates.bandwidth + (self.ranks - 1) * self.rates.latency

    def work(self, n_bytes: float) -> float:
        """Return the seconds that such an exchange takes from the processor: as measured within a
        node, where no link limits it; else its whole duration within a node where the processor
        moves the bytes, and 0 where DMA engines do."""
        if curve := self._within_node._curve("overlap_cost", 1):
            return curve.seconds(n_bytes)
        return self._within_node.exchange(n_bytes) if self.cpu_driven else 0.0

    def concurrent_speed(self, n_bytes: float, busiest: float = 0.0) -> float:
        """Return the speed of each of two concurrent exchanges over that of a single one; 0 where
        this was not measured: exchanges are then serialised."""
        curve = self._curve("all_to_all", 2)
        if curve is None:
            return 0.0
        return self.exchange(n_bytes, busiest) / self._measured(curve, 2 * n_bytes, 2 * busiest)

    def ring(self, n_bytes: float) -> float:
        """Return the seconds of an all-reduce in which a rank sends `n_bytes`."""
        if curve := self._curve("all_reduce", 1):
            return curve.seconds(n_bytes)
        return n_bytes / self.rates.bandwidth + 2 * (self.ranks - 1) * self.rates.latency

    def ring_work(self, n_bytes: float) -> float:
        """Return the seconds that an all-reduce takes from the processor: its whole duration within
        a node where the processor moves the bytes, else 0."""
        return self._within_node.ring(n_bytes) if self.cpu_driven else 0.0

    @property
    def _within_node(self) -> "Link":
        return Link(self.ranks, True, self.within, self.within, self.curves)

    def _measured(self, curve: Curve, n_bytes: float, busiest: float) -> float:
        """Interpolate; with uneven load, the most loaded link serves a single transfer."""
        even = curve.seconds(n_bytes)
        return max(even, self.ring(busiest)) if busiest > n_bytes else even

    def _curve(self, collective: Collective, at_once: int) -> Curve | None:
        """Return the curve that was measured on the most similar number of ranks."""
        wanted = collective, at_once, self.inside
        fitting = [c for c in self.curves if (c.collective, c.at_once, c.inside) == wanted]
        return min(fitting, key=lambda c: abs(math.log(c.ranks / self.ranks)), default=None)
