"""All-to-all and all-gather as messages between pairs of ranks, the receives posted first.

NCCL's are as good as they get. gloo's all-to-all posts what it sends before what it receives, and
tells a peer that it is ready for its rows over the same connection, behind its own: the two
directions of a link take turns. Its all-gather is a ring of P−1 steps, each of which waits for the
one before. Here every rank first says what it is ready for, then sends; in round i rank r sends to
r + i and receives from r − i, so that nobody is sent to by all at once.

P ranks on the axis.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from headway.parallel.mesh import Axis

try:
    from torch.distributed import all_gather_single as _all_gather
except ImportError:  # before torch 2.13
    from torch.distributed import all_gather_into_tensor as _all_gather


class Posted(NamedTuple):
    """Messages under way."""

    works: Sequence[dist.Work | None]
    """None for a collective that is done already."""

    def wait(self) -> None:
        """Stand still until all have come and gone."""
        for work in self.works:
            if work is not None:
                work.wait()


def all_to_all(
    received: Tensor,
    sent: Tensor,
    axis: Axis,
    receive: list[int] | None = None,
    send: list[int] | None = None,
) -> Posted:
    """Rows of `sent` to their ranks, in rank order; `receive` and `send` are rows per rank, equal
    without. Both tensors are contiguous and stay as they are until `wait`."""
    if not _one_by_one(axis):
        sizes = (receive, send)
        work = dist.all_to_all_single(received, sent, *sizes, group=axis.group, async_op=True)
        return Posted([work])
    equal = [len(sent) // axis.size] * axis.size
    return _post(received.split(receive or equal), sent.split(send or equal), axis)


def all_gather(received: Tensor, sent: Tensor, axis: Axis) -> Posted:
    """`[N, …]` → `[P·N, …]`, in rank order; contiguous, as they are until `wait`."""
    if not _one_by_one(axis):
        return Posted([_all_gather(received, sent, group=axis.group, async_op=True)])
    return _post(received.split([len(sent)] * axis.size), [sent] * axis.size, axis)


def _one_by_one(axis: Axis) -> bool:
    return dist.get_backend(axis.group) == "gloo"


def _post(received: Sequence[Tensor], sent: Sequence[Tensor], axis: Axis) -> Posted:
    """One tensor from and to every rank. Both ends know the sizes: nothing is no message."""
    works = []
    for i in range(1, axis.size):
        source = (axis.index - i) % axis.size
        if received[source].numel():
            works.append(dist.irecv(received[source], group=axis.group, group_src=source))
    for i in range(1, axis.size):
        target = (axis.index + i) % axis.size
        if sent[target].numel():
            works.append(dist.isend(sent[target], group=axis.group, group_dst=target))
    received[axis.index].copy_(sent[axis.index])
    return Posted(works)
