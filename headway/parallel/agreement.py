"""Check that options, versions, commit and data are the same on all ranks before they begin."""

from typing import Any

from headway.config import PeerError, UsageError


def check(rank: int, facts: list[dict[str, Any]]) -> None:
    """Raise on every rank if two differ: UsageError on rank 0, which prints it, PeerError on the
    others. `facts` are those of all ranks, in rank order."""
    text = difference(facts)
    if text:
        raise UsageError(text) if rank == 0 else PeerError(text)


def difference(facts: list[dict[str, Any]]) -> str:
    """Return a sentence on the first fact in which a rank differs from rank 0; "" for none."""
    first = facts[0]
    for rank, others in enumerate(facts):
        for name in [*first, *(name for name in others if name not in first)]:
            expected, value = first.get(name, "nothing"), others.get(name, "nothing")
            if value != expected:
                return (
                    f"rank {rank} has {name}={value} and rank 0 has {expected}; "
                    "start every rank with the same options, versions and data"
                )
    return ""
