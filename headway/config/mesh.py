"""Options of the mesh of processes."""

from dataclasses import dataclass
from typing import Literal

from headway.config.bounds import above_zero, at_least
from headway.config.errors import UsageError


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of processes."""

    dp: int = 1
    """Data parallel replicas."""
    hp: int = 1
    """Head Parallel: ranks that share the heads of a Multi-Head LatentMoE; divides moe.n_heads."""
    ep: int = 1
    """Expert Parallel: ranks that share the experts of a head; divides moe.n_experts."""
    ep_scheme: Literal["auto", "all_to_all", "all_gather"] = "auto"
    """How sub-tokens are sent on the ep axis. `all_to_all`: to the ranks of their experts, sizes
    follow the router. `all_gather`: to all ranks, sizes known in advance. `auto`: fewer bytes."""
    dedup: bool = True
    """With `all_to_all`: send a sub-token once to a rank that holds several of its experts (off:
    once per expert, as simple Expert Parallel does; for comparisons)."""
    shard: Literal["replicate", "fsdp", "hsdp"] = "replicate"
    """How the parameters that several ranks need are stored between their uses, with their
    gradients and optimiser state. `replicate`: replicated on each of those ranks; least traffic.
    `fsdp`: sharded over all ranks (experts: over dp), gathered block by block; take it when memory
    runs out, for about half as many bytes again. `hsdp`: sharded over the hp × ep ranks and
    replicated over dp; take it when gathers should stay within a machine."""
    chunks: int = 0
    """Chunks in which a micro-batch passes a sparse layer, 0 to 4: one is sent while another is
    computed, same result. 0 chooses: 2 where an all-to-all of the ep axis spans nodes, else 1. With
    `capacity_factor` or `aux_scope=sequence` a chunk holds whole sequences."""
    payload: Literal["matmul", "float8"] = "matmul"
    """How sub-tokens and their gradients are sent on hp and ep. `matmul`: in the dtype of the
    matmuls, exact. `float8`: e4m3 with one float32 scale per sub-token, half the bytes of bfloat16
    and about 2.6% of rounding in each of the four exchanges; for slow networks."""
    timeout: float = 600.0
    """Seconds after which a collective that does not finish ends the run; > 0."""

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return self.dp * self.hp * self.ep

    def check(self) -> None:
        """Raise UsageError for a value out of range, and for sharding that has nothing to share."""
        at_least(1, "mesh", vars(self), "dp hp ep")
        above_zero("mesh", vars(self), "timeout")
        if not 0 <= self.chunks <= 4:
            raise UsageError(f"mesh.chunks={self.chunks} is outside 0 to 4; use 0 (auto) or 1 to 4")
        if self.shard == "fsdp" and self.size == 1:
            raise UsageError(
                "mesh.shard=fsdp shares parameters among ranks, and there is 1; "
                "use mesh.shard=replicate or more ranks"
            )
        if self.shard == "hsdp" and (self.dp == 1 or self.size == self.dp):
            other, why = ("dp", "replicas") if self.dp == 1 else ("hp × ep", "ranks to share among")
            raise UsageError(
                f"mesh.shard=hsdp needs {why}, and {other}=1; use mesh.shard=fsdp or {other} ≥ 2"
            )
