"""How the tokens of one sparse layer travel on a mesh: Head Parallel around Expert Parallel.

`MeshDispatcher` is the `model.dispatch.TokenDispatcher` of a mesh: `scatter` and `gather` on the hp
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
    """The travel of all sparse layers of a model on a mesh."""

    mesh: Mesh
    n_chunks: int
    """Pieces of the tokens, so that one travels while the next is computed."""
    use_all_gather: bool
    """On ep: all-gather and reduce-scatter in place of the all-to-all that follows the router."""
    dedup: bool
    """On ep: one copy per rank and not per slot."""
    layer: int | None = None
    """Index of the block whose exchange this is, for the ledger."""

    def at(self, layer: int) -> "MeshDispatcher":
        """The same for one block."""
        return replace(self, layer=layer)

    @property
    def scheme(self) -> Literal["all_to_all", "all_to_all_per_slot", "all_gather"]:
        """How sub-tokens travel on ep, under the name that `plan` gives it."""
        if self.use_all_gather:
            return "all_gather"
        return "all_to_all" if self.dedup else "all_to_all_per_slot"

    def chunks(self, x_TD: Tensor, unit: int) -> Sequence[Tensor]:
        """`[T, D]` in equal pieces of whole units of `unit` tokens: as many as wanted, or the next
        smaller number that divides the units."""
        units = len(x_TD) // unit
        n = max(n for n in range(1, self.n_chunks + 1) if units % n == 0)
        return x_TD.chunk(n)

    def scatter(self, z_THL: Tensor, route: Route | None) -> Future[tuple[Tensor, Route | None]]:
        """Sub-tokens to the ranks of their heads, with their route if there is one already."""
        if self.mesh.hp.size == 1:
            return Completed((z_THL, route))
        return head.ScatterHandle(z_THL, route, self._wire("hp", "scatter"))

    def dispatch(
        self, z_THL: Tensor, route: Route, n_experts: int
    ) -> Future[expert.DispatchOutput]:
        """Sub-tokens to the ranks of their experts."""
        if self.mesh.ep.size == 1:
            return Completed(expert.DispatchOutput(z_THL, route, None))
        return expert.dispatch(
            z_THL,
            route,
            n_experts,
            self._wire("ep", "dispatch"),
            use_all_gather=self.use_all_gather,
            dedup=self.dedup,
        )

    def combine(self, y_THL: Tensor, metadata: expert.CombineMetadata | None) -> Future[Tensor]:
        """Outputs of the experts back to the rank of the head, summed."""
        return Completed(y_THL) if metadata is None else metadata.back(y_THL)

    def gather(self, y_THL: Tensor) -> Future[Tensor]:
        """Sub-tokens back to the ranks of their tokens."""
        if self.mesh.hp.size == 1:
            return Completed(y_THL)
        return head.GatherHandle(y_THL, self._wire("hp", "gather"))

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's values, for decisions that all ranks must take alike."""
        dist.broadcast(x, src=0)
        return x

    def _wire(self, axis: str, purpose: str) -> CommContext:
        mesh = self.mesh
        float8 = mesh.config.payload == "float8"
        among = mesh.hp if axis == "hp" else mesh.ep
        return CommContext(among, mesh.traffic, purpose, self.layer, float8)


def uses_all_gather(config: MeshConfig, top_k: int) -> bool:
    """Whether ep travels by all-gather; `auto` takes the scheme with fewer bytes.

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
    return size - 1 <= 1.02 * copies  # nearly equal: sizes known in advance are worth 2%
