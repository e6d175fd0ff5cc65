"""What a rank sends: bytes, calls and waiting time of every collective, by axis, purpose and layer.

The host knows the size of a collective when it issues it, so counting never waits for the device.
Bytes are those that leave the rank, without what it keeps for itself.

A layer is the index of a block in the model. Backward counts for the layer of its forward; what
serves several layers at once (sums of gradients, of the loss, of statistics) has no layer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Count:
    """Sums over some collectives."""

    bytes: int = 0
    calls: int = 0
    wait: float = 0.0
    """Seconds that the host was blocked. With NCCL the stream waits instead: near 0."""

    def add(self, other: "Count") -> None:
        """Add in place."""
        self.bytes += other.bytes
        self.calls += other.calls
        self.wait += other.wait


class Key(NamedTuple):
    """What is counted together."""

    axis: str
    purpose: str
    layer: int | None


@dataclass
class Traffic:
    """The traffic of a mesh. `take` returns the sums since the last `take`."""

    counts: dict[Key, Count] = field(default_factory=dict)
    calls: int = 0
    """Collectives issued since the start of the job; `take` does not reset it."""
    last: str = ""
    """Axis and purpose of the last of them."""
    wait: float = 0.0
    """Seconds that the host was blocked in all of them."""

    def add(self, axis: str, purpose: str, n_bytes: int, layer: int | None = None) -> None:
        """Count a collective that sends `n_bytes` from this rank."""
        self.last = f"{axis} {purpose}"
        self.calls += 1
        self._count(axis, purpose, layer).add(Count(n_bytes, 1))

    @contextmanager
    def waiting(self, axis: str, purpose: str, layer: int | None = None) -> Iterator[None]:
        """Count the time that a collective blocks the host in the body."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.wait += seconds
        self._count(axis, purpose, layer).wait += seconds

    def _count(self, axis: str, purpose: str, layer: int | None) -> Count:
        return self.counts.setdefault(Key(axis, purpose, layer), Count())

    def by_layer(self) -> dict[int, dict[str, Count]]:
        """Return `{layer: {axis: sums over purposes}}`, without what has no layer."""
        sums: dict[int, dict[str, Count]] = {}
        for key, count in self.counts.items():
            if key.layer is not None:
                sums.setdefault(key.layer, {}).setdefault(key.axis, Count()).add(count)
        return dict(sorted(sums.items()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what is sent in the body: an evaluation, a text sample, a checkpoint."""
        counts, self.counts = self.counts, {}
        try:
            yield
        finally:
            self.counts = counts

    def take(self) -> dict[str, dict[str, float]]:
        """Return `{"hp scatter": {"bytes": …, "calls": …, "wait": …}, …}` over all layers since the
        last call, and reset."""
        counts, self.counts = self.counts, {}
        sums: dict[str, Count] = {}
        for key, count in counts.items():
            sums.setdefault(f"{key.axis} {key.purpose}", Count()).add(count)
        return {name: dict(vars(count)) for name, count in sorted(sums.items())}
