"""Gather full tensors from the parts that all ranks hold."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.mesh import Axis
from headway.parallel.parallelize import Parallelism
from headway.parallel.placement import ShardSpec, to_local


def full_tensors(
    tensors: dict[str, Tensor], parallelism: Parallelism, parameter: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """Return every tensor at its global shape, on every rank, under its name. Collective.

    `parameter` gives the name of the parameter whose placement a tensor has, for optimiser states.
    """
    full = {}
    for name, x in tensors.items():
        x = to_local(x)
        placement = parallelism.sharding.placements.get(parameter(name))
        if placement is not None and placement.shard is not None:
            x = _unshard(x, placement.shard)
        for dim, axis in enumerate(placement.axes if placement else ()):
            x = _all_gather(x, dim, axis)
        full[name] = x
    return full


def _all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim)


def _unshard(x: Tensor, shard: ShardSpec) -> Tensor:
    """Return the slice that FSDP sharded; short shards are padded for the exchange."""
    dim, missing = shard.dim, shard.rows_per_rank - x.shape[shard.dim]
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)
    return _all_gather(x, dim, shard.axis).narrow(dim, 0, shard.rows)
