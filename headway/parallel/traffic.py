"""What a rank sends: bytes, calls and waiting time of every collective, by axis and by purpose.

Sizes are known to the host when a collective starts, so counting costs no wait for the device.
Bytes are those that leave the rank: what it keeps for itself is not on the wire.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Count:
    """Sums of one (axis, purpose)."""

    bytes: int = 0
    calls: int = 0
    wait: float = 0.0
    """Seconds that the host stood still in `wait`. With NCCL the host does not stand still there:
    the stream does, and this stays near 0."""


@dataclass
class Traffic:
    """The ledger of a mesh. `take` returns the sums since the last `take`."""

    counts: dict[str, Count] = field(default_factory=dict)
    calls: int = 0
    """Collectives begun since the start of the job; `take` leaves it."""
    last: str = ""
    """Axis and purpose of the last of them."""
    wait: float = 0.0
    """Seconds that the host stood still in all of them."""

    def add(self, axis: str, purpose: str, n_bytes: int) -> None:
        """One collective that sends `n_bytes` from this rank."""
        self.last = f"{axis} {purpose}"
        self.calls += 1
        count = self.counts.setdefault(self.last, Count())
        count.bytes += n_bytes
        count.calls += 1

    def waited(self, axis: str, purpose: str, seconds: float) -> None:
        """The host waited for a collective."""
        self.wait += seconds
        self.counts.setdefault(f"{axis} {purpose}", Count()).wait += seconds

    def total(self, axis: str = "") -> int:
        """Bytes so far, of one axis or of all."""
        return sum(c.bytes for key, c in self.counts.items() if key.startswith(axis))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is sent in the body is not counted: an evaluation, a text sample, a checkpoint."""
        kept, self.counts = self.counts, {}
        try:
            yield
        finally:
            self.counts = kept

    def take(self) -> dict[str, dict[str, float]]:
        """`{"hp dispatch": {"bytes": …, "calls": …, "wait": …}, …}` since the last call."""
        taken, self.counts = self.counts, {}
        return {key: dict(vars(count)) for key, count in sorted(taken.items())}
