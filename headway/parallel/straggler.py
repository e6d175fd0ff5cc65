"""Detect slow ranks by the time that each spends computing."""

import statistics

from headway.parallel.mesh import Mesh

RATIO = 1.5
"""A rank is slow when it computes for this many times the median of the others."""
MIN_SECONDS = 0.2
"""Seconds in an interval by which a slow rank exceeds that median: less is noise."""


class StragglerDetector:
    """Compares the ranks over an interval: time of the steps less time blocked in collectives. With
    NCCL the device waits and not the host, so all ranks look alike."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.waited = mesh, mesh.traffic.wait

    def slow_rank(self, seconds: float) -> str:
        """Return a sentence on the slowest rank if it is far behind the others, else "". `seconds`
        are those of this rank's steps since the last call. Collective, one small gather."""
        if self.mesh.size == 1:
            return ""
        waited, self.waited = self.mesh.traffic.wait - self.waited, self.mesh.traffic.wait
        return slowest(self.mesh.all_gather_object(max(seconds - waited, 0.0)))


def slowest(busy: list[float]) -> str:
    """Return the sentence for the busy seconds of all ranks; "" when none exceeds the others'
    median by `RATIO` and `MIN_SECONDS`."""
    rank = max(range(len(busy)), key=busy.__getitem__)
    median = statistics.median(busy[:rank] + busy[rank + 1 :])
    ratio = busy[rank] / max(median, 1e-9)
    if ratio < RATIO or busy[rank] - median < MIN_SECONDS:
        return ""
    return (
        f"slow rank: {rank} takes {ratio:.1f} times the median of the others "
        f"({busy[rank]:.2f} s of work against {median:.2f} s)"
    )
