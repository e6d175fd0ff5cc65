"""Where the part that a rank holds is in the full tensor: what reading and writing files need."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headway.parallel.placement import Sharding


@dataclass(frozen=True)
class LocalShard:
    """The part of one tensor that this rank holds."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    start: tuple[int, ...]
    """Index in the full tensor of the first element of this part."""
    writes: bool
    """Whether this rank writes it: the first of those that hold the same part."""

    def to_cpu(self) -> "LocalShard":
        """Return a copy on the CPU that shares no memory with this one."""
        copy = torch.empty(self.tensor.shape, dtype=self.tensor.dtype).copy_(self.tensor.detach())
        return replace(self, tensor=copy)


def local_shard(name: str, local: Tensor, sharding: Sharding, parameter: str = "") -> LocalShard:
    """Describe a tensor that this rank holds. An optimiser state is placed as its `parameter`."""
    placement = sharding.placements.get(parameter or name)
    if placement is None:
        return LocalShard(local, tuple(local.shape), (0,) * local.dim(), sharding.mesh.is_main)
    shape = list(local.shape)
    if placement.shard is not None:
        shape[placement.shard.dim] = placement.shard.rows
    for dim, axis in enumerate(placement.axes):
        shape[dim] *= axis.size
    start = tuple(part.start for part in placement.slices(shape))
    return LocalShard(local, tuple(shape), start, placement.first)


def local_slices(name: str, shape: tuple[int, ...], sharding: Sharding) -> tuple[slice, ...]:
    """Return the slices of a full tensor of `shape` that this rank holds; () for all of it."""
    placement = sharding.placements.get(name)
    if placement is None:
        return ()
    slices = placement.slices(shape)
    return () if slices == tuple(slice(0, n) for n in shape) else slices
