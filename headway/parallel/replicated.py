"""Sparse layers in decoding, where every rank holds all tokens: a rank computes its heads, or its
experts, and one collective of a size known in advance joins the outputs.

    hp   heads [p·H/P, (p+1)·H/P) of all tokens; all-gather of T·D_L values: the bits of one process
    ep   experts [p·E/P, (p+1)·E/P) of all tokens; all-reduce of T·D_L values, partial sums

Nothing is sent before the experts and no metadata: the ranks route the same tokens. Training sends
tokens instead (`dispatcher.py`), since its ranks hold different ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from headway.model.balance import RouteStats
from headway.model.dispatch import Completed, Future, TokenDispatcher
from headway.model.moe import SparseLayer
from headway.model.router import Route
from headway.parallel.collectives import CommContext
from headway.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class ReplicatedDispatcher(TokenDispatcher):
    """Joins what the ranks compute of the same tokens. Without gradients."""

    mesh: Mesh
    layer: int | None = None

    def at(self, layer: int) -> "ReplicatedDispatcher":
        return replace(self, layer=layer)

    def scatter(self, z_THL: Tensor, route: Route | None) -> Future[tuple[Tensor, Route | None]]:
        """Keep the sub-tokens of this rank's heads, and their part of a route."""
        if route is not None:
            index_THK, gate_THK = self._heads(route.index_THK), self._heads(route.gate_THK)
            route = route._replace(index_THK=index_THK, gate_THK=gate_THK)
        return Completed((self._heads(z_THL), route))

    def dispatch(
        self, z_THL: Tensor, route: Route, n_experts: int
    ) -> Future[tuple[Tensor, Route, None]]:
        """Keep the choices of this rank's experts; the others become choices that do nothing."""
        ep = self.mesh.ep
        if ep.size > 1:
            n = n_experts // ep.size
            index_THK = route.index_THK - ep.index * n
            elsewhere = (index_THK < 0) | (index_THK >= n)
            route = route._replace(index_THK=index_THK.masked_fill(elsewhere, n))
        return Completed((z_THL, route, None))

    def combine(self, y_THL: Tensor, metadata: None) -> Future[Tensor]:
        """Sum the outputs of all ranks' experts, in float32 or better."""
        axis = self.mesh.ep
        if axis.size > 1:
            sum_THL = y_THL.to(torch.promote_types(y_THL.dtype, torch.float32))
            comm = self._comm(axis, "combine")
            comm.add(2 * sum_THL.nbytes * (axis.size - 1) // axis.size)
            with comm.waiting():
                dist.all_reduce(sum_THL, group=axis.group)
            y_THL = sum_THL.to(y_THL.dtype)
        return Completed(y_THL)

    def gather(self, y_THL: Tensor, exact: bool = False) -> Future[Tensor]:
        """Return the outputs of all heads, in order."""
        axis = self.mesh.hp
        if axis.size > 1:
            parts = [torch.empty_like(y_THL) for _ in range(axis.size)]
            comm = self._comm(axis, "gather")
            comm.add(y_THL.nbytes * (axis.size - 1))
            with comm.waiting():
                dist.all_gather(parts, y_THL.contiguous(), group=axis.group)
            y_THL = torch.cat(parts, 1)
        return Completed(y_THL)

    def _heads(self, x_THX: Tensor) -> Tensor:
        axis = self.mesh.hp
        n = x_THX.shape[1] // axis.size
        return x_THX[:, axis.index * n : (axis.index + 1) * n].contiguous()

    def _comm(self, axis: Axis, purpose: str) -> CommContext:
        return CommContext(axis, self.mesh.traffic, purpose, self.layer)


def experts_read(
    mesh: Mesh, layers: Sequence[SparseLayer], stats: Sequence[RouteStats]
) -> list[int]:
    """Return how many experts each rank read in a pass over the same tokens on all ranks: those
    with at least one row, summed over the sparse layers. Collective."""
    counts = [_own(mesh, *pair) for pair in zip(layers, stats, strict=True)]
    n_read = sum(int(counts_HE.count_nonzero()) for counts_HE in counts)
    if mesh.size == 1:
        return [n_read]
    count = torch.tensor(n_read, device=mesh.device)
    comm = CommContext(mesh.world, mesh.traffic, "experts read")
    comm.add(count.nbytes * (mesh.size - 1))
    each = [torch.empty_like(count) for _ in range(mesh.size)]
    with comm.waiting():
        dist.all_gather(each, count, group=mesh.world.group)
    return [int(n) for n in each]


def _own(mesh: Mesh, layer: SparseLayer, stats: RouteStats) -> Tensor:
    """Return the counts of the experts that this rank holds, without those that do nothing."""
    counts_HE, ep = stats.counts_HE, mesh.ep
    if mesh.size == 1 and not layer.config.n_zero_experts:
        return counts_HE
    if layer.reads_token:  # each rank has chosen for all heads
        counts_HE = counts_HE.chunk(mesh.hp.size)[mesh.hp.index]
    n = layer.config.n_experts // ep.size
    return counts_HE[:, ep.index * n : (ep.index + 1) * n]
