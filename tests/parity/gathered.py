"""Whole tensors from the slices of all ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.dispatcher import Parallelism
from headway.parallel.mesh import Axis
from headway.parallel.placement import ShardSpec, local


def whole(
    slices: dict[str, Tensor], parallelism: Parallelism, owner: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """Every tensor at its global shape, on every rank; names as they are. Collective.

    `owner` gives the parameter in whose place a tensor lies, for optimiser states.
    """
    found = {}
    for name, x in slices.items():
        x = local(x)
        placement = parallelism.sharding.placements.get(owner(name))
        if placement is not None and placement.pieces is not None:
            x = _join_pieces(x, placement.pieces)
        for dim, axis in enumerate(placement.axes if placement else ()):
            x = _join(x, dim, axis)
        found[name] = x
    return found


def _join(x: Tensor, dim: int, axis: Axis) -> Tensor:
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim)


def _join_pieces(x: Tensor, pieces: ShardSpec) -> Tensor:
    """The slice that FSDP cut; the last pieces travel filled up."""
    dim, missing = pieces.dim, pieces.each - x.shape[pieces.dim]
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)
    return _join(x, dim, pieces.axis).narrow(dim, 0, pieces.rows)
