"""Parameters in pieces (`mesh.shard`) equal one process in everything that training, evaluation,
sampling and checkpoints show."""

import pytest

from headway.config import MeshConfig, OptimConfig, RouterConfig
from tests.parity.test_parity import check, model_config

ADAMW = OptimConfig(lr=1e-3, clip=0.5)
MUON = OptimConfig(name="muon", lr=1e-3, clip=0.5)


@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(2, 1, 1, shard="fsdp"),
        MeshConfig(4, 1, 1, shard="fsdp"),
        MeshConfig(2, 2, 1, shard="fsdp"),
        MeshConfig(1, 2, 2, shard="fsdp"),
        MeshConfig(2, 1, 2, shard="hsdp"),
    ],
    ids=lambda m: f"{m.shard}-dp{m.dp}-hp{m.hp}-ep{m.ep}",
)
def test_multi_head(ranks, mesh, optim):
    check(ranks, mesh, model_config(), optim)
