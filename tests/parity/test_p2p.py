"""Messages between pairs bring what the backend's own collectives bring."""

import pytest
import torch
import torch.distributed as dist

from headway.config import MeshConfig
from headway.parallel.p2p import all_gather, all_to_all

ROWS = ((3, 0, 2, 5), (0, 0, 0, 0), (1, 4, 0, 0), (2, 2, 7, 1))
"""From rank r to every rank: nothing to some, nothing at all from one."""


def exchanged(mesh, dtype, equal):
    """Ours and the backend's, two under way at once and waited for in the other order."""
    axis = mesh.ep
    sent = [2] * axis.size if equal else list(ROWS[axis.index][: axis.size])
    received = [2] * axis.size if equal else [ROWS[r][axis.index] for r in range(axis.size)]
    works, results, wanted = [], [], []
    for turn in range(2):
        x = torch.arange(sum(sent) * 3).view(-1, 3).add(100 * axis.index + 1000 * turn).to(dtype)
        ours = x.new_empty(sum(received), 3)
        theirs = torch.empty_like(ours)
        sizes = () if equal else (received, sent)
        works.append(all_to_all(ours, x, axis, *sizes))
        dist.all_to_all_single(theirs, x, *sizes, group=axis.group)
        results.append(ours)
        wanted.append(theirs)
    for work in reversed(works):
        work.wait()
    return results, wanted


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64], ids=str
)
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("mesh", [MeshConfig(ep=4), MeshConfig(hp=2, ep=2)], ids=str)
def test_all_to_all(ranks, mesh, equal, dtype):
    for results, wanted in ranks.run(mesh, exchanged, dtype, equal):
        for ours, theirs in zip(results, wanted, strict=True):
            assert torch.equal(ours, theirs)


def gathered(mesh, n):
    x = torch.arange(n * 3.0).view(n, 3) + 100 * mesh.rank
    ours = x.new_empty(mesh.ep.size * n, 3)
    all_gather(ours, x, mesh.ep).wait()
    theirs = [torch.empty_like(x) for _ in range(mesh.ep.size)]
    dist.all_gather(theirs, x, group=mesh.ep.group)
    return ours, torch.cat(theirs)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("mesh", [MeshConfig(ep=4), MeshConfig(hp=2, ep=2)], ids=str)
def test_all_gather(ranks, mesh, n):
    for ours, theirs in ranks.run(mesh, gathered, n):
        assert torch.equal(ours, theirs)
