"""Head Parallel (arXiv 2602.04870): the all-to-all is before routing, over heads.

Rank p of the `hp` axis holds heads [p·H/P, (p+1)·H/P) with their experts. Every rank sends every
other the sub-tokens of its heads: equally many bytes to each, whatever the router chooses.

    scatter  [T, H, L] of the local tokens, all heads  →  [P·T, H/P, L] of all tokens, local heads
    gather   the inverse

A router that reads the token has run before; its indices and gates are sent in the same exchange.
"""

from torch import Tensor

from headway.model.router import Route
from headway.parallel.collectives import CommContext, all_to_all, index_dtype


class ScatterHandle:
    """`[T, H, L]` and a route `[T, H, K]` → `[P·T, H/P, L]` and `[P·T, H/P, K]`, in rank order."""

    def __init__(self, z_THL: Tensor, route: Route | None, comm: CommContext) -> None:
        self.route = route
        parts = [z_THL]
        if route is not None:
            dtype = index_dtype(route.stats.counts_HE.numel())
            parts += [route.index_THK.to(dtype), route.gate_THK]
        self.collective = all_to_all([_by_rank(part, comm.axis.size) for part in parts], comm)

    def wait(self) -> tuple[Tensor, Route | None]:
        """Return the sub-tokens of the local heads and their route, whose statistics remain those
        of the local tokens."""
        z_THL, *indices_and_gates = self.collective.wait()
        if self.route is None:
            return z_THL, None
        index_THK, gate_THK = indices_and_gates
        return z_THL, Route(index_THK.long(), gate_THK, self.route.stats)


class GatherHandle:
    """The inverse: `[P·T, H/P, L]` → `[T, H, L]`, every token on its rank, heads in order."""

    def __init__(self, y_THL: Tensor, comm: CommContext) -> None:
        self.collective, self.size = all_to_all([y_THL], comm), comm.axis.size

    def wait(self) -> Tensor:
        """Return `[T, H, L]`."""
        (y_PTHL,) = self.collective.wait()
        return y_PTHL.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2)


def _by_rank(x_THX: Tensor, size: int) -> Tensor:
    """`[T, H, X]` → `[P·T, H/P, X]`, the heads of rank 0 first."""
    return x_THX.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
