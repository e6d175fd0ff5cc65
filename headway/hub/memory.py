"""The most memory that a piece of work needs."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Filled when the work is done."""

    bytes: int = 0
    """Most resident memory of the process during the work, above that before it."""


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the work inside. Where the system does not reset its peak (it is Linux that does),
    what the process held before may hide some of it."""
    peak = Peak()
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # VmHWM counts from here
    before = _resident("VmRSS")
    yield peak
    peak.bytes = max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes; elsewhere the peak since the process began."""
    if _STATUS.exists():
        return int(_STATUS.read_text().split(f"{field}:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
