"""Expert Parallel: rank p of the `ep` axis holds experts [p·E/P, (p+1)·E/P) of every local head;
after routing, sub-tokens are sent to the ranks of their experts, and the outputs back.

Three schemes. Rank 0 of P = 2, with H = 1 and K = 2, has sub-tokens a and b; a chose experts 1 2, b
chose 2 3. Rank 0 holds experts 0 1, rank 1 holds 2 3; both number them 0 1, and – means elsewhere:

    scheme      rows to rank 0 | 1   sent with each row         metadata for combine
    all_to_all       a   | a b       local indices 1 – | – 0,   sub-token of each row: a | a b
                                     0 1; the gates
      per slot       a   | a b b     local index 1 | 0, 0, 1    row of each slot: a 0 1, b 2 3;
                                                                the gates
    all_gather       a b | a b       experts 1 2, 2 3; gates    none

- `all_to_all`, one copy per rank: a rank sums the outputs of its experts times their gates and
  sends one row back; combine sums the rows of a sub-token (as DeepEP does).
- `all_to_all` per slot (`dedup=False`): K rows each way; combine multiplies by the gates.
- `all_gather`: every sub-token to every rank, sums back by reduce-scatter. All sizes are known in
  advance; fewer bytes where P is small compared with K.

The first two exchange counts first, and wait for the device to read them.

N sub-tokens (T·H) · K slots · P ranks · R rows sent · M sub-tokens received."""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from headway.model.dispatch import Future
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

Scheme = Literal["all_to_all", "all_to_all_per_slot", "all_gather"]


DispatchOutput: TypeAlias = "tuple[Tensor, Route, CombineMetadata | None]"
"""Sub-tokens on the rank of their experts, their route, and None where nothing was sent."""


class CombineMetadata:
    """What combine needs from dispatch; one subclass per scheme. `splits` are those of its
    all-to-all; None for a reduce-scatter."""

    def __init__(self, comm: CommContext, x: "_SubTokens", splits: Splits | None) -> None:
        self.comm, self.shape, self.n_local = comm._replace(purpose="combine"), x.shape, x.n_local
        self.splits = splits

    def local_route(self, *received: Tensor) -> tuple[Tensor, ...]:
        """Return indices of local experts, `n_local` where an expert is elsewhere, and gates."""
        return received

    def start_combine(self, y_M1L: Tensor) -> Future[Tensor]:
        """Send the outputs back → `[T, H, L]`, summed over experts."""
        y_ML = y_M1L.squeeze(1)
        if self.splits is None:
            collective = reduce_scatter(y_ML, self.comm)
        else:
            collective = all_to_all([y_ML], self.comm, self.splits.swapped())
        return collective.then(lambda y_RL: self.combine(y_RL).view(self.shape))

    def combine(self, y_RL: Tensor) -> Tensor:
        """Sum the outputs that came back → `[N, L]`."""
        raise NotImplementedError


class _SubTokens(NamedTuple):
    """What is to be dispatched."""

    shape: torch.Size
    z_NL: Tensor
    gate_NK: Tensor
    owner_NK: Tensor
    """Rank that holds the expert of a slot; P for a dropped slot."""
    local_NK: Tensor
    """Index of the expert among the local experts of its owner."""
    n_local: int
    """Local experts of a rank, of all its heads."""


def dispatch(
    z_THL: Tensor, route: Route, n_experts: int, comm: CommContext, scheme: Scheme
) -> Future[DispatchOutput]:
    """Send `[T, H, L]` to the experts that `route` chose among `n_experts` per head → `[M, 1, L]`,
    and its route over the H·E/P local experts as one head."""
    T, H, L = z_THL.shape
    per_rank = n_experts // comm.axis.size
    index_NK = route.index_THK.reshape(T * H, -1)
    head_N1 = torch.arange(H, device=z_THL.device).repeat(T).unsqueeze(1)
    x = _SubTokens(
        z_THL.shape,
        z_THL.reshape(T * H, L),
        route.gate_THK.reshape(T * H, -1),
        index_NK.div(per_rank, rounding_mode="floor"),
        head_N1 * per_rank + index_NK % per_rank,
        H * per_rank,
    )
    match scheme:
        case "all_gather":
            collective, metadata = _dispatch_to_all(x, comm)
        case "all_to_all":
            collective, metadata = _dispatch_rows(x, comm)
        case "all_to_all_per_slot":
            collective, metadata = _dispatch_slots(x, comm)

    def receive(z_ML: Tensor, *received: Tensor) -> DispatchOutput:
        index_MK, gate_MK = (part.unsqueeze(1) for part in metadata.local_route(*received))
        local = route._replace(index_THK=index_MK.long(), gate_THK=gate_MK)
        return z_ML.unsqueeze(1), local, metadata

    return collective.then(receive)


def _dispatch_to_all(x: _SubTokens, comm: CommContext) -> tuple[AsyncCollective, CombineMetadata]:
    size = comm.axis.size
    n_all = size * x.n_local
    index_NK = torch.where(x.owner_NK < size, x.owner_NK * x.n_local + x.local_NK, n_all)
    collective = all_gather((x.z_NL, index_NK.to(index_dtype(n_all)), x.gate_NK), comm)
    return collective, _AllGathered(comm, x, None)


class _AllGathered(CombineMetadata):
    def local_route(self, index_MK: Tensor, gate_MK: Tensor) -> tuple[Tensor, ...]:
        local_MK = index_MK.long() - self.comm.axis.index * self.n_local
        elsewhere_MK = (local_MK < 0) | (local_MK >= self.n_local)
        return torch.where(elsewhere_MK, self.n_local, local_MK), gate_MK

    def combine(self, y_RL: Tensor) -> Tensor:
        return y_RL


def _dispatch_rows(x: _SubTokens, comm: CommContext) -> tuple[AsyncCollective, CombineMetadata]:
    size, n = comm.axis.size, len(x.z_NL)
    needs_NP = torch.zeros(n, size + 1, dtype=torch.bool, device=x.z_NL.device)
    needs_PN = needs_NP.scatter_(1, x.owner_NK, True)[:, :size].T
    splits = exchange_counts(needs_PN.sum(1), comm._replace(purpose="counts"))
    rank_R, row_R = needs_PN.nonzero(as_tuple=True)
    on_rank_RK = x.owner_NK[row_R] == rank_R.unsqueeze(1)
    index_RK = torch.where(on_rank_RK, x.local_NK[row_R], x.n_local)
    rows = _Rows(row_R, splits.send, n)
    z_RL, index_RK = _TakeRows.apply(x.z_NL, rows), index_RK.to(index_dtype(size * x.n_local))
    parts = (z_RL, index_RK, _TakeRows.apply(x.gate_NK, rows))
    collective = all_to_all(parts, comm, splits)  # type: ignore[arg-type]
    return collective, _RowMetadata(comm, x, splits, rows)


class _RowMetadata(CombineMetadata):
    def __init__(self, comm: CommContext, x: _SubTokens, splits: Splits, rows: "_Rows") -> None:
        super().__init__(comm, x, splits)
        self.rows = rows

    def combine(self, y_RL: Tensor) -> Tensor:
        return _SumRows.apply(y_RL, self.rows)  # type: ignore[return-value]


def _dispatch_slots(x: _SubTokens, comm: CommContext) -> tuple[AsyncCollective, CombineMetadata]:
    size, K = comm.axis.size, x.owner_NK.shape[1]
    owner_S = x.owner_NK.flatten()
    counts_P = torch.bincount(owner_S, minlength=size + 1)[:size]
    splits = exchange_counts(counts_P, comm._replace(purpose="counts"))
    # sorted by owner, without the dropped slots, which are last
    slot_R = torch.sort(owner_S, stable=True).indices[: sum(splits.send)]
    row_S = torch.full_like(owner_S, len(slot_R))
    row_S[slot_R] = torch.arange(len(slot_R), device=slot_R.device)
    index_R1 = x.local_NK.flatten()[slot_R].to(index_dtype(x.n_local)).unsqueeze(1)
    z_RL = x.z_NL.repeat_interleave(K, 0)[slot_R]
    collective = all_to_all((z_RL, index_R1), comm, splits)
    return collective, _SlotMetadata(comm, x, splits, row_S.view_as(x.owner_NK))


class _SlotMetadata(CombineMetadata):
    """Every received row goes through one expert, with gate 1."""

    def __init__(self, comm: CommContext, x: _SubTokens, splits: Splits, row_NK: Tensor) -> None:
        super().__init__(comm, x, splits)
        self.row_NK, self.gate_NK = row_NK, x.gate_NK

    def local_route(self, index_M1: Tensor) -> tuple[Tensor, ...]:
        return index_M1, torch.ones_like(index_M1, dtype=self.gate_NK.dtype)

    def combine(self, y_RL: Tensor) -> Tensor:
        padded = torch.cat([y_RL, y_RL.new_zeros(1, y_RL.shape[1])])  # for dropped slots
        y_NKL = padded[self.row_NK].to(self.gate_NK.dtype)
        return (self.gate_NK.unsqueeze(-1) * y_NKL).sum(1).to(y_RL.dtype)


class _Rows:
    """Sub-token of each row to send, grouped by rank; no sub-token twice within a rank."""

    def __init__(self, row_R: Tensor, counts: list[int], n: int) -> None:
        self.row_R, self.counts, self.n = row_R, counts, n

    def sum(self, y_RL: Tensor) -> Tensor:
        """Map `[R, L]` to `[N, L]`, rank after rank, so that the order of the sum is fixed."""
        wide = torch.float64 if y_RL.dtype == torch.float64 else torch.float32
        total_NL = torch.zeros(self.n, y_RL.shape[1], dtype=wide, device=y_RL.device)
        for row, y in zip(self.row_R.split(self.counts), y_RL.split(self.counts), strict=True):
            total_NL.index_add_(0, row, y.to(wide))
        return total_NL.to(y_RL.dtype)


class _TakeRows(torch.autograd.Function):
    """Sub-tokens `[N, L]` → rows to send `[R, L]`; the adjoint of `_SumRows`."""

    @staticmethod
    def forward(ctx, x_NL: Tensor, rows: _Rows):  # type: ignore[override]
        ctx.rows = rows
        return x_NL[rows.row_R]

    @staticmethod
    def backward(ctx, grad_RL: Tensor):  # type: ignore[override]
        return ctx.rows.sum(grad_RL), None


class _SumRows(torch.autograd.Function):
    """Rows that came back `[R, L]` → their sums `[N, L]`; the adjoint of `_TakeRows`."""

    @staticmethod
    def forward(ctx, y_RL: Tensor, rows: _Rows):  # type: ignore[override]
        ctx.rows = rows
        return rows.sum(y_RL)

    @staticmethod
    def backward(ctx, grad_NL: Tensor):  # type: ignore[override]
        return grad_NL[ctx.rows.row_R], None
