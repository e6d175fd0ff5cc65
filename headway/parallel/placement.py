"""Which part of a parameter or buffer a rank holds.

Every tensor has a global name and a global shape, whatever the mesh. The axes of the mesh give a
rank a slice of it; FSDP may shard that slice again. `experts.w_in` `[H=4, E=6, …]` on dp=2, hp=2,
ep=2 as the rank dp=1, hp=0, ep=1 holds it:

    full tensor                    slice by axes (hp, ep)     shard over dp along dim 0
    E   0 1 2 3 4 5                    3 4 5
    H 0 · · · x x x    hp=0: H 0 1     x x x    dp=0
      1 · · · x x x    ep=1: E 3 4 5   x x x    dp=1: H 1         x x x
      2 · · · · · ·
      3 · · · · · ·
    shape [4, 6, …]                [2, 3, …]                  [1, 3, …], start (1, 3, …)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from headway.model.moe import SparseLayer
from headway.model.roles import SplitOver, roles_of
from headway.model.transformer import Transformer
from headway.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class ShardSpec:
    """How FSDP shards a slice over an axis: rows of one dim in equal shards, of which the last ones
    may be shorter or empty (as `torch.chunk` does)."""

    dim: int
    rows: int
    """Size of the slice along `dim`."""
    axis: Axis

    @property
    def rows_per_rank(self) -> int:
        """Rows of every full shard."""
        return -(-self.rows // self.axis.size)

    def length(self, index: int) -> int:
        """Return the rows of the shard of rank `index` of the axis."""
        return max(0, min(self.rows_per_rank, self.rows - index * self.rows_per_rank))

    @property
    def start(self) -> int:
        """First row of this rank's shard."""
        return min(self.axis.index * self.rows_per_rank, self.rows)


@dataclass(frozen=True)
class Placement:
    """Which part of one tensor this rank holds."""

    axes: tuple[Axis, ...]
    """Dim i is split evenly over axes[i]; further dims are not split."""
    replicas: Axis
    """The ranks that hold the same slice; their gradients are summed."""
    first: bool
    """Whether this rank is the first of them: it counts the slice in global sums."""
    shard: ShardSpec | None = None
    """How FSDP shards the slice, if it does. It then sums the gradients itself."""

    def slices(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Return the part of a full tensor of `shape` that this rank holds: one slice per dim."""
        start, size = [0] * len(shape), list(shape)
        for dim, axis in enumerate(self.axes):
            size[dim] //= axis.size
            start[dim] = axis.index * size[dim]
        if (shard := self.shard) is not None:
            start[shard.dim] += shard.start
            size[shard.dim] = shard.length(shard.axis.index)
        return tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))


@dataclass(frozen=True)
class Sharding:
    """The placement of every parameter and buffer of a model, by name."""

    mesh: Mesh
    placements: dict[str, Placement]

    def local_view(self, name: str, full: Tensor) -> Tensor:
        """Return the part of a full tensor that this rank holds, a view."""
        placement = self.placements.get(name)
        return full if placement is None else full[placement.slices(full.shape)]

    def local_heads(self, x: Tensor, layer: SparseLayer) -> Tensor:
        """Return the rows of a statistic `[H, …]` of all heads for the heads whose router is on
        this rank; a scalar is returned as it is."""
        H = layer.router.w_HEL.shape[0]
        if not x.dim() or x.shape[0] == H:
            return x
        return x[self.mesh.hp.index * H : (self.mesh.hp.index + 1) * H]


def partition(model: Transformer, mesh: Mesh) -> Sharding:
    """Replace the tensors of a full model by this rank's slices, in place; return their
    placements. FSDP comes after it (`fsdp.apply_fsdp`)."""
    replicated = Placement((), mesh.world, mesh.is_main)
    placement_of = {
        SplitOver.NONE: replicated,
        SplitOver.HEADS: Placement((mesh.hp,), mesh.routers, mesh.routers.index == 0),
        SplitOver.EXPERTS: Placement((mesh.hp, mesh.ep), mesh.dp, mesh.dp.index == 0),
    }
    if mesh.hp.size == 1:
        placement_of[SplitOver.HEADS] = replicated
    placements = {name: placement_of[role.shard] for name, role in roles_of(model).items()}
    sharding = Sharding(mesh, placements)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if placements[name].axes:
                # a copy, so that the memory of the full tensor is freed
                local = sharding.local_view(name, tensor).clone()
                tensor.set_(local)  # type: ignore[call-overload]
    return sharding


def to_local(x: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: a plain tensor itself, this rank's shard
    of a `DTensor`. It shares memory with `x`."""
    return x.to_local().detach() if isinstance(x, DTensor) else x
