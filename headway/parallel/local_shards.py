"""Where in a whole tensor the part of this rank lies: what reading and writing files need."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.parallel.placement import Sharding


@dataclass(frozen=True)
class LocalShard:
    """The part of one tensor that lies on this rank."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: tuple[int, ...]
    """Index in the whole tensor of the first element of this part."""
    writes: bool
    """Whether this rank writes it: the first of those that hold the same part."""

    def copied(self) -> "LocalShard":
        """The same on the CPU, in memory of its own."""
        tensor = self.tensor.detach()
        kept = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        return LocalShard(kept, self.shape, self.start, self.writes)


def piece(name: str, local: Tensor, sharding: Sharding, owner: str = "") -> LocalShard:
    """Of a tensor of this rank; `owner` is the parameter in whose place it lies, for optimiser
    states."""
    placement = sharding.placements.get(owner or name)
    if placement is None:
        return LocalShard(local, tuple(local.shape), (0,) * local.dim(), sharding.mesh.is_main)
    shape, start = list(local.shape), [0] * local.dim()
    if (cut := placement.pieces) is not None:
        shape[cut.dim], start[cut.dim] = cut.rows, cut.start
    for dim, axis in enumerate(placement.axes):
        start[dim] += axis.index * shape[dim]
        shape[dim] *= axis.size
    return LocalShard(local, tuple(shape), tuple(start), placement.first)


def window(name: str, shape: tuple[int, ...], sharding: Sharding) -> tuple[slice, ...]:
    """What of a whole tensor of this shape belongs here: one slice per dim, () for all of it."""
    placement = sharding.placements.get(name)
    if placement is None:
        return ()
    start, size = [0] * len(shape), list(shape)
    for dim, axis in enumerate(placement.axes):
        size[dim] //= axis.size
        start[dim] = axis.index * size[dim]
    if (cut := placement.pieces) is not None:
        start[cut.dim] += cut.start
        size[cut.dim] = cut.length(cut.axis.index)
    if tuple(size) == shape:
        return ()
    return tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))
