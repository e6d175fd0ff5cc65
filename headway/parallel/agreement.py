"""What must be alike on all ranks before they begin: options, versions, commit, data."""

from typing import Any

from headway.config import PeerError, UsageError


def check(rank: int, facts: list[dict[str, Any]]) -> None:
    """Raises on every rank where two differ: UsageError on rank 0, which prints it, PeerError on
    the others. `facts` are those of all ranks, in rank order."""
    text = difference(facts)
    if text:
        raise UsageError(text) if rank == 0 else PeerError(text)


def difference(facts: list[dict[str, Any]]) -> str:
    """The first fact in which a rank differs from rank 0, as a sentence; empty for none."""
    first = facts[0]
    for rank, theirs in enumerate(facts):
        for name in [*first, *(name for name in theirs if name not in first)]:
            here, there = first.get(name, "nothing"), theirs.get(name, "nothing")
            if here != there:
                return (
                    f"rank {rank} has {name}={there} and rank 0 has {here}; "
                    "start every rank with the same options, versions and data"
                )
    return ""
