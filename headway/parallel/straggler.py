"""Which rank is slow: the time that each spends on work of its own."""

import statistics

from headway.parallel.mesh import Mesh

LIMIT = 1.5
"""A rank is slow when its work takes this many times the median of the others."""
LEAST = 0.2
"""Seconds of work in an interval by which a slow rank exceeds that median: less is noise."""


class StragglerDetector:
    """Compares the ranks over an interval: time of the steps less time waited in collectives.

    With NCCL the host does not wait, the device does, and all ranks look alike.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.waited = mesh, mesh.traffic.wait

    def slow_rank(self, seconds: float) -> str:
        """A sentence on the slowest rank when it is far behind the others, else empty; `seconds` of
        this rank's steps since the last call. Collective, one small gather."""
        if self.mesh.size == 1:
            return ""
        waited, self.waited = self.mesh.traffic.wait - self.waited, self.mesh.traffic.wait
        return slowest(self.mesh.all_gather_object(max(seconds - waited, 0.0)))


def slowest(busy: list[float]) -> str:
    """Of the busy seconds of all ranks; empty when none exceeds the others' median by
    `LIMIT` and `LEAST`."""
    rank = max(range(len(busy)), key=busy.__getitem__)
    median = statistics.median(busy[:rank] + busy[rank + 1 :])
    ratio = busy[rank] / max(median, 1e-9)
    if ratio < LIMIT or busy[rank] - median < LEAST:
        return ""
    return (
        f"slow rank: {rank} takes {ratio:.1f} times the median of the others "
        f"({busy[rank]:.2f} s of work against {median:.2f} s)"
    )
