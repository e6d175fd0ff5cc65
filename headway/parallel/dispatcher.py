"""The token dispatcher of a mesh: Head Parallel around Expert Parallel.

`MeshDispatcher` is a `model.dispatch.TokenDispatcher`: `scatter` and `gather` communicate on the hp
axis, before routing and after the experts; `dispatch` and `combine` on the ep axis between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from headway.config import MeshConfig
from headway.model.dispatch import Completed, Future
from headway.model.router import Route
from headway.parallel import expert, head
from headway.parallel.collectives import CommContext
from headway.parallel.mesh import Mesh


@dataclass(frozen=True)
class MeshDispatcher:
    """Exchanges the tokens of the sparse layers of a model on a mesh."""

    mesh: Mesh
    n_chunks: int
    """Chunks of the tokens, so that one is communicated while the next is computed."""
    use_all_gather: bool
    """On ep: all-gather and reduce-scatter instead of the all-to-all that depends on the route."""
    dedup: bool
    """On ep: one copy per rank and not per slot."""
    layer: int | None = None
    """Index of the block that exchanges, for `mesh.traffic`."""

    def at(self, layer: int) -> "MeshDispatcher":
        """Return the dispatcher of one block."""
        return replace(self, layer=layer)

    @property
    def scheme(self) -> Literal["all_to_all", "all_to_all_per_slot", "all_gather"]:
        """Return the Expert Parallel scheme under the name that `plan` gives it."""
        if self.use_all_gather:
            return "all_gather"
        return "all_to_all" if self.dedup else "all_to_all_per_slot"

    def chunks(self, x_TD: Tensor, unit: int) -> Sequence[Tensor]:
        """Return `[T, D]` in equal chunks of whole units of `unit` tokens: `n_chunks`, or the next
        smaller number that divides the units."""
        units = len(x_TD) // unit
        n = max(n for n in range(1, self.n_chunks + 1) if units % n == 0)
        return x_TD.chunk(n)

    def scatter(self, z_THL: Tensor, route: Route | None) -> Future[tuple[Tensor, Route | None]]:
        """Send sub-tokens to the ranks of their heads, with their route if they have one."""
        if self.mesh.hp.size == 1:
            return Completed((z_THL, route))
        return head.ScatterHandle(z_THL, route, self._comm("hp", "scatter"))

    def dispatch(
        self, z_THL: Tensor, route: Route, n_experts: int
    ) -> Future[expert.DispatchOutput]:
        """Send sub-tokens to the ranks of their experts."""
        if self.mesh.ep.size == 1:
            return Completed(expert.DispatchOutput(z_THL, route, None))
        return expert.dispatch(
            z_THL,
            route,
            n_experts,
            self._comm("ep", "dispatch"),
            use_all_gather=self.use_all_gather,
            dedup=self.dedup,
        )

    def combine(self, y_THL: Tensor, metadata: expert.CombineMetadata | None) -> Future[Tensor]:
        """Return the experts' outputs to the ranks of their heads, summed over the experts."""
        return Completed(y_THL) if metadata is None else metadata.start_combine(y_THL)

    def gather(self, y_THL: Tensor, exact: bool = False) -> Future[Tensor]:
        """Send sub-tokens back to the ranks of their tokens; `exact` in the dtype they have."""
        if self.mesh.hp.size == 1:
            return Completed(y_THL)
        comm = self._comm("hp", "gather")
        return head.GatherHandle(y_THL, comm._replace(float8=comm.float8 and not exact))

    def broadcast(self, x: Tensor) -> Tensor:
        """Replace `x` by rank 0's values, for decisions that must be the same on all ranks."""
        dist.broadcast(x, src=0)
        return x

    def _comm(self, axis: str, purpose: str) -> CommContext:
        mesh = self.mesh
        float8 = mesh.config.payload == "float8"
        over = mesh.hp if axis == "hp" else mesh.ep
        return CommContext(over, mesh.traffic, purpose, self.layer, float8)


def uses_all_gather(config: MeshConfig, top_k: int) -> bool:
    """Return whether Expert Parallel uses the all-gather scheme; `auto` takes the one with fewer
    bytes.

    All-gather sends P−1 copies of a sub-token. The all-to-all sends it to each other rank that has
    one of its K experts, (P−1)·(1 − (1 − 1/P)^K) of them when choices are independent, or
    K·(P−1)/P times without de-duplication.
    """
    size = config.ep
    if config.ep_scheme != "auto":
        return config.ep_scheme == "all_gather"
    copies = (
        (size - 1) * (1 - (1 - 1 / size) ** top_k) if config.dedup else top_k * (size - 1) / size
    )
    return size - 1 <= 1.02 * copies  # sizes that are known in advance are worth 2% more bytes
