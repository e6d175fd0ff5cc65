"""Apply a function of full matrices to sharded ones: each on one rank, all ranks at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headway.parallel import p2p
from headway.parallel.placement import ShardSpec
from headway.parallel.traffic import Traffic


def apply_to_full(
    shards: Sequence[Tensor],
    specs: Sequence[ShardSpec],
    function: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    traffic: Traffic,
    purpose: str,
) -> list[Tensor]:
    """Return this rank's shards of `function(full)` for up to P tensors sharded over the same axis
    of P ranks, in `dtype`. Collective.

    Rank i gathers tensor i and computes: one all-to-all sends it the shards, another returns those
    of the result. Every element is sent to one rank and not to all of them.

    Args:
        shards: this rank's shard of each tensor, all of one dtype and device.
        specs: how each is sharded.
        function: maps a full tensor to one of the same shape."""
    axis = specs[0].axis
    assert len(shards) <= axis.size and all(spec.axis is axis for spec in specs)
    ranks = range(axis.size)
    outgoing = [shards[i].numel() if i < len(shards) else 0 for i in ranks]
    shapes: list[list[int]] = []  # of the shards of the tensor that is gathered here
    if axis.index < len(shards):
        spec, shape = specs[axis.index], list(shards[axis.index].shape)
        shapes = [[*shape[: spec.dim], spec.length(r), *shape[spec.dim + 1 :]] for r in ranks]
    incoming = [int(torch.Size(shape).numel()) for shape in shapes] or [0] * axis.size

    def exchange(x: Tensor, send: list[int], receive: list[int]) -> list[Tensor]:
        traffic.add(axis.name, purpose, (x.numel() - send[axis.index]) * x.element_size())
        received = x.new_empty(sum(receive))
        p2p.all_to_all(received, x, axis, receive, send).wait()
        return list(received.split(receive))

    received = exchange(torch.cat([x.flatten() for x in shards]), outgoing, incoming)
    result = shards[0].new_empty(0, dtype=dtype)
    if shapes:
        dim = specs[axis.index].dim
        full = torch.cat([x.view(shape) for x, shape in zip(received, shapes, strict=True)], dim)
        parts = function(full).to(dtype).split([shape[dim] for shape in shapes], dim)
        result = torch.cat([part.flatten() for part in parts])
    returned = exchange(result, incoming, outgoing)
    return [x.view(shard.shape) for x, shard in zip(returned, shards, strict=False)]
