"""How many experts each rank of a decoding mesh read, from what its own router counted."""

import pytest
import torch

from headway.config import MeshConfig, MoEConfig, RouterConfig
from headway.model.balance import RouteStats
from headway.model.moe import SparseLayer
from headway.parallel.mesh import Mesh
from headway.parallel.replicated import experts_read

H, E, D = 4, 6, 32


def counts_of(layer: int) -> torch.Tensor:
    """How many rows chose each expert of all heads, many none."""
    generator = torch.Generator().manual_seed(layer)
    return torch.randint(-3, 3, (H, E), generator=generator).clamp(min=0).float()


def read(mesh, reads):
    """What each rank says, the counts being those of the heads that its router saw."""
    moe = MoEConfig(
        kind="multi_head_latent", n_heads=H, n_experts=E, router=RouterConfig(reads=reads)
    )
    layers, stats = [SparseLayer(D, moe) for _ in range(3)], []
    for i in range(3):
        counts_HE, nothing = counts_of(i), torch.zeros(())
        if reads == "sub_token":
            n = H // mesh.hp.size
            counts_HE = counts_HE[mesh.hp.index * n :][:n]
        stats.append(RouteStats(counts_HE, *[nothing] * 4))
    mesh.traffic.take()
    numbers = experts_read(mesh, layers, stats)
    return numbers, {k: v["bytes"] for k, v in mesh.traffic.take().items()}


@pytest.mark.parametrize("reads", ["sub_token", "token"])
@pytest.mark.parametrize(
    "mesh", [MeshConfig(hp=2), MeshConfig(hp=4), MeshConfig(ep=2), MeshConfig(hp=2, ep=2)], ids=str
)
def test_each_rank_counts_the_experts_that_it_holds(ranks, mesh, reads):
    expected = []
    for rank in range(mesh.size):
        h, e = divmod(rank, mesh.ep)
        n_heads, n_experts = H // mesh.hp, E // mesh.ep
        part = [
            counts_of(i)[h * n_heads : (h + 1) * n_heads, e * n_experts : (e + 1) * n_experts]
            for i in range(3)
        ]
        expected.append(sum(int((x > 0).sum()) for x in part))
    for numbers, sent in ranks.run(mesh, read, reads):
        assert numbers == expected
        assert sum(sent.values()) == 8 * (mesh.size - 1)
    assert sum(expected) == read(Mesh(), reads)[0][0]
