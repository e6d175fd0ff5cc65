"""What a rank sends: bytes, calls and waiting time of every collective, by axis, purpose and layer.

Sizes are known to the host when a collective starts, so counting costs no wait for the device.
Bytes are those that leave the rank: what it keeps for itself is not on the wire.

A layer is the index of a block in the model. Backward belongs to the layer of its forward; what
serves several layers at once (sums of gradients, of the loss, of statistics) belongs to none.
"""

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
    """Seconds that the host stood still in `wait`. With NCCL the host does not stand still there:
    the stream does, and this stays near 0."""

    def add(self, other: "Count") -> None:
        """Adds in place."""
        self.bytes += other.bytes
        self.calls += other.calls
        self.wait += other.wait


class Key(NamedTuple):
    """What a sum is of."""

    axis: str
    purpose: str
    layer: int | None


@dataclass
class Traffic:
    """The ledger of a mesh. `take` returns the sums since the last `take`."""

    counts: dict[Key, Count] = field(default_factory=dict)
    calls: int = 0
    """Collectives begun since the start of the job; `take` leaves it."""
    last: str = ""
    """Axis and purpose of the last of them."""
    wait: float = 0.0
    """Seconds that the host stood still in all of them."""

    def add(self, axis: str, purpose: str, n_bytes: int, layer: int | None = None) -> None:
        """One collective that sends `n_bytes` from this rank."""
        self.last = f"{axis} {purpose}"
        self.calls += 1
        self._of(axis, purpose, layer).add(Count(n_bytes, 1))

    def waited(self, axis: str, purpose: str, seconds: float, layer: int | None = None) -> None:
        """The host waited for a collective."""
        self.wait += seconds
        self._of(axis, purpose, layer).wait += seconds

    def _of(self, axis: str, purpose: str, layer: int | None) -> Count:
        return self.counts.setdefault(Key(axis, purpose, layer), Count())

    def by_layer(self) -> dict[int, dict[str, Count]]:
        """`{layer: {axis: sums over purposes}}` so far, without what belongs to no layer."""
        found: dict[int, dict[str, Count]] = {}
        for key, count in self.counts.items():
            if key.layer is not None:
                found.setdefault(key.layer, {}).setdefault(key.axis, Count()).add(count)
        return dict(sorted(found.items()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is sent in the body is not counted: an evaluation, a text sample, a checkpoint."""
        kept, self.counts = self.counts, {}
        try:
            yield
        finally:
            self.counts = kept

    def take(self) -> dict[str, dict[str, float]]:
        """`{"hp scatter": {"bytes": …, "calls": …, "wait": …}, …}` over all layers since the last
        call."""
        taken, self.counts = self.counts, {}
        found: dict[str, Count] = {}
        for key, count in taken.items():
            found.setdefault(f"{key.axis} {key.purpose}", Count()).add(count)
        return {name: dict(vars(count)) for name, count in sorted(found.items())}
