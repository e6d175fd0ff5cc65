"""What needs whole matrices where they lie in pieces: each on one rank, all ranks at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headway.parallel import p2p as pairwise
from headway.parallel.placement import ShardSpec
from headway.parallel.traffic import Traffic


def apply_to_full(
    mine: Sequence[Tensor],
    cuts: Sequence[ShardSpec],
    function: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    traffic: Traffic,
    purpose: str,
) -> list[Tensor]:
    """This rank's pieces of `function(whole)` for up to P tensors cut over the same axis of P
    ranks, in `dtype`. Collective.

    Rank i joins tensor i and computes; an all-to-all brings it the pieces, another takes those of
    the result back. Every element travels to one rank and not to all of them.

    Args:
        mine: this rank's piece of each, all of one dtype and device.
        cuts: how each is cut.
        function: of a whole tensor, to one of its shape.
    """
    axis = cuts[0].axis
    assert len(mine) <= axis.size and all(cut.axis is axis for cut in cuts)
    ranks = range(axis.size)
    outgoing = [mine[i].numel() if i < len(mine) else 0 for i in ranks]
    shapes: list[list[int]] = []  # of the pieces of the tensor that is whole here
    if axis.index < len(mine):
        cut, shape = cuts[axis.index], list(mine[axis.index].shape)
        shapes = [[*shape[: cut.dim], cut.length(r), *shape[cut.dim + 1 :]] for r in ranks]
    incoming = [int(torch.Size(shape).numel()) for shape in shapes] or [0] * axis.size

    def exchange(x: Tensor, send: list[int], receive: list[int]) -> list[Tensor]:
        traffic.add(axis.name, purpose, (x.numel() - send[axis.index]) * x.element_size())
        received = x.new_empty(sum(receive))
        pairwise.all_to_all(received, x, axis, receive, send).wait()
        return list(received.split(receive))

    arrived = exchange(torch.cat([x.flatten() for x in mine]), outgoing, incoming)
    back = mine[0].new_empty(0, dtype=dtype)
    if shapes:
        dim = cuts[axis.index].dim
        pieces = [x.view(shape) for x, shape in zip(arrived, shapes, strict=True)]
        done = function(torch.cat(pieces, dim)).to(dtype)
        parts = done.split([shape[dim] for shape in shapes], dim)
        back = torch.cat([part.flatten() for part in parts])
    found = exchange(back, incoming, outgoing)
    return [x.view(old.shape) for x, old in zip(found, mine, strict=False)]
