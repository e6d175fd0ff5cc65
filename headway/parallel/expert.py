"""Expert Parallel: rank p of the `ep` axis owns experts [p·E/P, (p+1)·E/P) of every head it holds;
sub-tokens travel to the experts that were chosen for them, after routing.

N sub-tokens (T·H) · K slots · P ranks · M sub-tokens received. Three ways to travel:

- `all_to_all`, one copy per rank: a sub-token goes once to each rank that holds some of its
  experts, with its indices and gates; that rank adds up what its experts say, times their gates,
  and sends one row back. This is what DeepEP does.
- `all_to_all`, one copy per slot (`dedup=False`): K rows there and K rows back, gates stay at home.
- `all_gather`: every sub-token to every rank, sums back by reduce-scatter. Sizes are fixed in
  advance and there is no metadata; fewer bytes where P is small beside K.

The first two need one exchange of counts, and wait for the device to read it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from headway.model.router import Route
from headway.parallel.collectives import (
    AsyncCollective,
    CommContext,
    Splits,
    all_gather,
    all_to_all,
    exchange_counts,
    index_dtype,
    reduce_scatter,
)


class DispatchOutput(NamedTuple):
    """Sub-tokens at the rank of their experts, and the way back; None where they never left."""

    z_THL: Tensor
    route: Route
    trip: "CombineMetadata | None"


class DispatchHandle:
    """Sub-tokens on their way to the experts of this rank."""

    def __init__(self, flight: AsyncCollective, route: Route, trip: "CombineMetadata") -> None:
        self.flight, self.route, self.trip = flight, route, trip

    def wait(self) -> DispatchOutput:
        """`z [M, 1, L]`, its route over the H·E/P local experts as one head, and the way back."""
        z_ML, *rest = self.flight.wait()
        index_MK, gate_MK = self.trip.local(z_ML, rest)
        route = self.route._replace(
            index_THK=index_MK.long().unsqueeze(1), gate_THK=gate_MK.unsqueeze(1)
        )
        return DispatchOutput(z_ML.unsqueeze(1), route, self.trip)


class CombineMetadata:
    """How the outputs come home; one subclass per way to travel."""

    def __init__(self, wire: CommContext, shape: torch.Size, n_local: int) -> None:
        self.wire, self.shape, self.n_local = wire, shape, n_local

    def local(self, z_ML: Tensor, rest: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Indices among the local experts, `n_local` where an expert is elsewhere, and gates."""
        return rest[0], rest[1]

    def back(self, y_M1L: Tensor) -> "CombineHandle":
        """Start the way home."""
        raise NotImplementedError

    def combine(self, y_RL: Tensor) -> Tensor:
        """What came home → `[T, H, L]`."""
        raise NotImplementedError


class CombineHandle:
    """Outputs on their way home."""

    def __init__(self, flight: AsyncCollective, trip: CombineMetadata) -> None:
        self.flight, self.trip = flight, trip

    def wait(self) -> Tensor:
        """`[T, H, L]`."""
        return self.trip.combine(self.flight.wait()[0]).view(self.trip.shape)


def dispatch(
    z_THL: Tensor,
    route: Route,
    n_experts: int,
    wire: CommContext,
    *,
    use_all_gather: bool,
    dedup: bool,
) -> DispatchHandle:
    """Send `[T, H, L]` to the experts that `route` chose among `n_experts` per head."""
    size, index = wire.axis.size, wire.axis.index
    T, H, L = z_THL.shape
    each = n_experts // size
    n_local = H * each
    z_NL, gate_NK = z_THL.reshape(T * H, L), route.gate_THK.reshape(T * H, -1)
    index_NK = route.index_THK.reshape(T * H, -1)
    head_N1 = torch.arange(H, device=z_THL.device).repeat(T).unsqueeze(1)
    # the owner of a slot's expert (P for a dropped slot), and the expert's number over there
    owner_NK = index_NK.div(each, rounding_mode="floor")
    there_NK = head_N1 * each + index_NK % each
    narrow = index_dtype(H * n_experts)
    if use_all_gather:
        both_NK = torch.where(owner_NK < size, owner_NK * n_local + there_NK, size * n_local)
        flight = all_gather((z_NL, both_NK.to(narrow), gate_NK), wire)
        return DispatchHandle(flight, route, _Gathered(wire, z_THL.shape, n_local, index))
    if not dedup:
        return _per_slot(z_NL, gate_NK, owner_NK, there_NK, route, wire, z_THL.shape, n_local)
    needs_NP = torch.zeros(T * H, size + 1, dtype=torch.bool, device=z_THL.device)
    needs_PN = needs_NP.scatter_(1, owner_NK, True)[:, :size].T
    splits = exchange_counts(needs_PN.sum(1), wire._replace(purpose="counts"))
    rank_R, row_R = needs_PN.nonzero(as_tuple=True)
    here_RK = owner_NK[row_R] == rank_R.unsqueeze(1)
    index_RK = torch.where(here_RK, there_NK[row_R], n_local)
    rows = _Rows(row_R, splits.send, T * H)
    parts = (_Take.apply(z_NL, rows), index_RK.to(narrow), _Take.apply(gate_NK, rows))
    flight = all_to_all(parts, wire, splits)  # type: ignore[arg-type]
    return DispatchHandle(flight, route, _PerRank(wire, z_THL.shape, n_local, rows, splits))


class _Gathered(CombineMetadata):
    def __init__(self, wire: CommContext, shape: torch.Size, n_local: int, index: int) -> None:
        super().__init__(wire, shape, n_local)
        self.index = index

    def local(self, z_ML, rest):
        mine_MK = rest[0].long() - self.index * self.n_local
        there_MK = (mine_MK < 0) | (mine_MK >= self.n_local)
        return torch.where(there_MK, self.n_local, mine_MK), rest[1]

    def back(self, y_M1L: Tensor) -> CombineHandle:
        wire = self.wire._replace(purpose="combine")
        return CombineHandle(reduce_scatter(y_M1L.squeeze(1), wire), self)

    def combine(self, y_RL: Tensor) -> Tensor:
        return y_RL


class _PerRank(CombineMetadata):
    def __init__(
        self, wire: CommContext, shape: torch.Size, n_local: int, rows: "_Rows", splits: Splits
    ) -> None:
        super().__init__(wire, shape, n_local)
        self.rows, self.splits = rows, splits

    def back(self, y_M1L: Tensor) -> CombineHandle:
        wire = self.wire._replace(purpose="combine")
        return CombineHandle(all_to_all([y_M1L.squeeze(1)], wire, self.splits.swapped()), self)

    def combine(self, y_RL: Tensor) -> Tensor:
        return _Sum.apply(y_RL, self.rows)  # type: ignore[return-value]


class _PerSlot(CombineMetadata):
    """One row per slot: every received row goes through one expert, with gate 1."""

    def __init__(
        self, wire: CommContext, shape: torch.Size, n_local: int, splits: Splits, row_NK, gate_NK
    ) -> None:
        super().__init__(wire, shape, n_local)
        self.splits, self.row_NK, self.gate_NK = splits, row_NK, gate_NK

    def local(self, z_ML, rest):
        return rest[0], torch.ones_like(rest[0], dtype=self.gate_NK.dtype)

    def back(self, y_M1L: Tensor) -> CombineHandle:
        wire = self.wire._replace(purpose="combine")
        return CombineHandle(all_to_all([y_M1L.squeeze(1)], wire, self.splits.swapped()), self)

    def combine(self, y_RL: Tensor) -> Tensor:
        padded = torch.cat([y_RL, y_RL.new_zeros(1, y_RL.shape[1])])  # of the dropped slots
        y_NKL = padded[self.row_NK].to(self.gate_NK.dtype)
        return (self.gate_NK.unsqueeze(-1) * y_NKL).sum(1).to(y_RL.dtype)


def _per_slot(
    z_NL: Tensor,
    gate_NK: Tensor,
    owner_NK: Tensor,
    there_NK: Tensor,
    route: Route,
    wire: CommContext,
    shape: torch.Size,
    n_local: int,
) -> DispatchHandle:
    size, K = wire.axis.size, owner_NK.shape[1]
    owner_R = owner_NK.flatten()
    order_R = torch.sort(owner_R, stable=True).indices
    counts_P = torch.bincount(owner_R, minlength=size + 1)[:size]
    splits = exchange_counts(counts_P, wire._replace(purpose="counts"))
    kept_R = order_R[: sum(splits.send)]  # dropped slots sort behind all others
    row_NK = torch.full_like(owner_R, len(kept_R))
    row_NK[kept_R] = torch.arange(len(kept_R), device=kept_R.device)
    there_R1 = there_NK.flatten()[kept_R].to(index_dtype(n_local)).unsqueeze(1)
    z_RL = z_NL.repeat_interleave(K, 0)[kept_R]
    flight = all_to_all((z_RL, there_R1), wire, splits)
    trip = _PerSlot(wire, shape, n_local, splits, row_NK.view_as(owner_NK), gate_NK)
    return DispatchHandle(flight, route, trip)


class _Rows:
    """Sub-token of each row to send, rows of one rank together: within a rank none comes twice."""

    def __init__(self, row_R: Tensor, counts: list[int], n: int) -> None:
        self.row_R, self.counts, self.n = row_R, counts, n

    def sum(self, y_RL: Tensor) -> Tensor:
        """`[R, L]` → `[N, L]`: rank after rank, so the order of the sum is fixed."""
        wide = torch.float64 if y_RL.dtype == torch.float64 else torch.float32
        total_NL = torch.zeros(self.n, y_RL.shape[1], dtype=wide, device=y_RL.device)
        for row, y in zip(self.row_R.split(self.counts), y_RL.split(self.counts), strict=True):
            total_NL.index_add_(0, row, y.to(wide))
        return total_NL.to(y_RL.dtype)


class _Take(torch.autograd.Function):
    """x_NL → rows to send; the adjoint of `_Sum`."""

    @staticmethod
    def forward(ctx, x_NL: Tensor, rows: _Rows):  # type: ignore[override]
        ctx.rows = rows
        return x_NL[rows.row_R]

    @staticmethod
    def backward(ctx, grad_RL: Tensor):  # type: ignore[override]
        return ctx.rows.sum(grad_RL), None


class _Sum(torch.autograd.Function):
    """Rows that came home → their sums; the adjoint of `_Take`."""

    @staticmethod
    def forward(ctx, y_RL: Tensor, rows: _Rows):  # type: ignore[override]
        ctx.rows = rows
        return rows.sum(y_RL)

    @staticmethod
    def backward(ctx, grad_NL: Tensor):  # type: ignore[override]
        return grad_NL[ctx.rows.row_R], None
