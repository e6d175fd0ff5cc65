"""Whole tensors from the slices of all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.exchange import Spread
from headway.parallel.mesh import Axis


def whole(slices: dict[str, Tensor], spread: Spread) -> dict[str, Tensor]:
    """Every tensor at its global shape, on every rank; names as they are. Collective."""
    return {name: _whole(name, x, spread) for name, x in slices.items()}


def _whole(name: str, x: Tensor, spread: Spread) -> Tensor:
    placement = spread.layout.placements.get(name)
    for dim, axis in enumerate(placement.axes if placement else ()):
        x = _join(x, dim, axis)
    return x


def _join(x: Tensor, dim: int, axis: Axis) -> Tensor:
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim)
