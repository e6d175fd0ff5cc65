"""All-to-all and all-gather as messages between pairs of ranks; receives are posted before sends.

NCCL's own collectives are used where NCCL runs. gloo's all-to-all posts its sends before its
receives, and announces to a peer that a receive is ready over the same connection, behind its own
data: the two directions of a link take turns. Its all-gather is a ring of P−1 steps, each of which
waits for the one before. Here every rank first posts all receives, then all sends; in round i rank
r sends to r+i and receives from r−i, so that in each round every rank has one sender. For P = 3:

    rank   posts receives from    then sends to       round 1        round 2
      0          2, 1                 1, 2           0 → 1          0 → 2
      1          0, 2                 2, 0           1 → 2          1 → 0
      2          1, 0                 0, 1           2 → 0          2 → 1

P ranks on the axis."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from headway.parallel.mesh import Axis

try:
    from torch.distributed import all_gather_single as _all_gather
except ImportError:  # before torch 2.13
    from torch.distributed import all_gather_into_tensor as _all_gather


class Works(NamedTuple):
    """The messages of a collective that has been issued."""

    works: Sequence[dist.Work | None]
    """None for a collective that is complete already."""

    def wait(self) -> None:
        """Block until all are complete."""
        for work in self.works:
            if work is not None:
                work.wait()


def all_to_all(
    received: Tensor,
    sent: Tensor,
    axis: Axis,
    receive: list[int] | None = None,
    send: list[int] | None = None,
) -> Works:
    """Send rows of `sent` to their ranks, in rank order. `receive` and `send` are rows per rank;
    equally many without them. Both tensors are contiguous and must not change before `wait`."""
    if not _uses_gloo(axis):
        sizes = (receive, send)
        work = dist.all_to_all_single(received, sent, *sizes, group=axis.group, async_op=True)
        return Works([work])
    equal = [len(sent) // axis.size] * axis.size
    return _post(received.split(receive or equal), sent.split(send or equal), axis)


def all_gather(received: Tensor, sent: Tensor, axis: Axis) -> Works:
    """Map `[N, …]` to `[P·N, …]`, in rank order; contiguous, and unchanged until `wait`."""
    if not _uses_gloo(axis):
        return Works([_all_gather(received, sent, group=axis.group, async_op=True)])
    return _post(received.split([len(sent)] * axis.size), [sent] * axis.size, axis)


def _uses_gloo(axis: Axis) -> bool:
    return dist.get_backend(axis.group) == "gloo"


def _post(received: Sequence[Tensor], sent: Sequence[Tensor], axis: Axis) -> Works:
    """Exchange one tensor with every rank. Both ends know the sizes: empty ones are not sent."""
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
    return Works(works)
