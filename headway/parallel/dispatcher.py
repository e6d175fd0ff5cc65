"""The token dispatcher of a mesh: Head Parallel around Expert Parallel.

`MeshDispatcher` is a `model.dispatch.TokenDispatcher`: `scatter` and `gather` communicate on the hp
axis, before routing and after the experts; `dispatch` and `combine` on the ep axis between them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor

from headway.config import MeshConfig
from headway.model.dispatch import Completed, Future, TokenDispatcher
from headway.model.router import Route
from headway.parallel import expert, head
from headway.parallel.collectives import CommContext
from headway.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class MeshDispatcher(TokenDispatcher):
    """Exchanges the tokens of the sparse layers of a model on a mesh."""

    mesh: Mesh
    n_chunks: int
    """Chunks of the tokens, so that one is communicated while the next is computed."""
    scheme: expert.Scheme
    """How ep communicates: an all-to-all that depends on the route, with one copy per rank or per
    slot, or all-gather and reduce-scatter."""
    layer: int | None = None
    """Index of the block that exchanges, for `mesh.traffic`."""

    def at(self, layer: int) -> "MeshDispatcher":
        return replace(self, layer=layer)

    def chunks(self, x_TD: Tensor, unit: int) -> Sequence[Tensor]:
        """Return `[T, D]` in equal chunks of whole units of `unit` tokens: `n_chunks`, or the next
        smaller number that divides the units."""
        units = len(x_TD) // unit
        n = max(n for n in range(1, self.n_chunks + 1) if units % n == 0)
        return x_TD.chunk(n)

    def scatter(self, z_THL: Tensor, route: Route | None) -> Future[tuple[Tensor, Route | None]]:
        if self.mesh.hp.size == 1:
            return super().scatter(z_THL, route)
        return head.scatter(z_THL, route, self._comm(self.mesh.hp, "scatter"))

    def dispatch(
        self, z_THL: Tensor, route: Route, n_experts: int
    ) -> Future[expert.DispatchOutput]:
        if self.mesh.ep.size == 1:
            return super().dispatch(z_THL, route, n_experts)
        comm = self._comm(self.mesh.ep, "dispatch")
        return expert.dispatch(z_THL, route, n_experts, comm, self.scheme)

    def combine(self, y_THL: Tensor, metadata: expert.CombineMetadata | None) -> Future[Tensor]:
        return Completed(y_THL) if metadata is None else metadata.start_combine(y_THL)

    def gather(self, y_THL: Tensor, exact: bool = False) -> Future[Tensor]:
        if self.mesh.hp.size == 1:
            return super().gather(y_THL)
        comm = self._comm(self.mesh.hp, "gather")
        return head.gather(y_THL, comm._replace(float8=comm.float8 and not exact))

    def broadcast(self, x: Tensor) -> Tensor:
        dist.broadcast(x, src=0)
        return x

    def _comm(self, axis: Axis, purpose: str) -> CommContext:
        float8 = self.mesh.config.payload == "float8"
        return CommContext(axis, self.mesh.traffic, purpose, self.layer, float8)


def ep_scheme(config: MeshConfig, top_k: int) -> expert.Scheme:
    """Return the scheme of Expert Parallel; `auto` takes the one with fewer bytes.

    All-gather sends P−1 copies of a sub-token. The all-to-all sends it to each other rank that has
    one of its K experts, (P−1)·(1 − (1 − 1/P)^K) of them when choices are independent, or
    K·(P−1)/P times without de-duplication."""
    size, scheme, copies = config.ep, "all_to_all_per_slot", top_k * (config.ep - 1) / config.ep
    if config.dedup:
        scheme, copies = "all_to_all", (size - 1) * (1 - (1 - 1 / size) ** top_k)
    fewer = size - 1 <= 1.02 * copies  # sizes that are known in advance are worth 2% more bytes
    if config.ep_scheme == "all_gather" or (config.ep_scheme == "auto" and fewer):
        return "all_gather"
    return scheme
