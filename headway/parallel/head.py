"""Head Parallel (arXiv 2602.04870): the all-to-all happens before routing, on heads.

Rank p of the `hp` axis owns heads [p·H/P, (p+1)·H/P) with their experts. Every rank sends every
other the sub-tokens of its heads: the same number of bytes to each, whatever the router will say.

    scatter  [T, H, L] of my tokens, all heads  →  [P·T, H/P, L] of all tokens, my heads
    gather   the inverse

A router that reads the whole token has run before; its indices and gates ride in the same exchange.
"""

from torch import Tensor

from headway.model.router import Route
from headway.parallel.collectives import CommContext, all_to_all, index_dtype


class ScatterHandle:
    """`[T, H, L]` and a route `[T, H, K]` → `[P·T, H/P, L]` and `[P·T, H/P, K]`, in rank order."""

    def __init__(self, z_THL: Tensor, route: Route | None, wire: CommContext) -> None:
        self.route = route
        parts = [z_THL]
        if route is not None:
            narrow = index_dtype(route.stats.counts_HE.numel())
            parts += [route.index_THK.to(narrow), route.gate_THK]
        self.flight = all_to_all([_by_rank(part, wire.axis.size) for part in parts], wire)

    def wait(self) -> tuple[Tensor, Route | None]:
        """Sub-tokens of my heads, and their route; its statistics stay those of my tokens."""
        z_THL, *rest = self.flight.wait()
        if self.route is None:
            return z_THL, None
        return z_THL, Route(rest[0].long(), rest[1], self.route.stats)


class GatherHandle:
    """The way back: `[P·T, H/P, L]` → `[T, H, L]`, every token to its rank, heads in order."""

    def __init__(self, y_THL: Tensor, wire: CommContext) -> None:
        self.flight, self.size = all_to_all([y_THL], wire), wire.axis.size

    def wait(self) -> Tensor:
        """`[T, H, L]`."""
        (y_PTHL,) = self.flight.wait()
        return y_PTHL.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2)


def _by_rank(x_THX: Tensor, size: int) -> Tensor:
    """`[T, H, X]` → `[P·T, H/P, X]`, the heads of rank 0 first."""
    return x_THX.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
