"""Head Parallel (arXiv 2602.04870): the all-to-all is before routing, over heads.

Rank p of the `hp` axis holds heads [p·H/P, (p+1)·H/P) with their experts. Every rank sends every
other the sub-tokens of its heads: equally many bytes to each, whatever the router chooses.

    scatter  [T, H, L] of the local tokens, all heads  →  [P·T, H/P, L] of all tokens, local heads
    gather   the inverse

A router that reads the token has run before; its indices and gates are sent in the same exchange.
"""

from torch import Tensor

from headway.model.dispatch import Future
from headway.model.router import Route
from headway.parallel.collectives import CommContext, all_to_all, index_dtype


def scatter(
    z_THL: Tensor, route: Route | None, comm: CommContext
) -> Future[tuple[Tensor, Route | None]]:
    """Map `[T, H, L]` and a route `[T, H, K]` to `[P·T, H/P, L]` and `[P·T, H/P, K]`, in rank
    order. The statistics of the route remain those of the local tokens."""
    parts = [z_THL]
    if route is not None:
        dtype = index_dtype(route.stats.counts_HE.numel())
        parts += [route.index_THK.to(dtype), route.gate_THK]

    def receive(z_THL: Tensor, *index_and_gate: Tensor) -> tuple[Tensor, Route | None]:
        if route is None:
            return z_THL, None
        index_THK, gate_THK = index_and_gate
        return z_THL, Route(index_THK.long(), gate_THK, route.stats)

    return all_to_all([_by_rank(part, comm.axis.size) for part in parts], comm).then(receive)


def gather(y_THL: Tensor, comm: CommContext) -> Future[Tensor]:
    """Invert `scatter`: `[P·T, H/P, L]` → `[T, H, L]`, tokens on their ranks, heads in order."""

    def receive(y_PTHL: Tensor) -> Tensor:
        return y_PTHL.unflatten(0, (comm.axis.size, -1)).transpose(0, 1).flatten(1, 2)

    return all_to_all([y_THL], comm).then(receive)


def _by_rank(x_THX: Tensor, size: int) -> Tensor:
    """Map `[T, H, X]` to `[P·T, H/P, X]`, the heads of rank 0 first."""
    return x_THX.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
