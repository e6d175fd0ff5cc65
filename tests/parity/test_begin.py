"""A rank that never holds the whole model has the bits of one that does."""

from dataclasses import replace

import pytest
import torch

from headway.config import BalanceConfig, MeshConfig, RouterConfig
from headway.model.transformer import Transformer
from headway.parallel.parallelize import materialize, parallelize
from headway.parallel.placement import to_local
from tests.parity.gathered import full_tensors
from tests.parity.test_parity import heads

NOISY = RouterConfig(noisy=True)
SCALES = {"layers.0.ffn.router.w_HEL": 0.5, "layers.1.ffn.experts.w_in_HEGFL": 3.0}
MODEL = replace(heads(router=NOISY, d_shared=16, balance=BalanceConfig(bias="sign")), tied=True)


def start(mesh):
    """Slices of this rank one way and the other; those of all ranks, put together."""
    with torch.device("meta"):
        model = Transformer(MODEL)
    parallelism = materialize(model, mesh, 3, SCALES)
    reference = Transformer(MODEL, seed=3)
    with torch.no_grad():
        for name, scale in SCALES.items():
            reference.get_parameter(name).mul_(scale)
    everything = {n: x.clone() for n, x in reference.state_dict().items()}
    parallelize(reference, mesh)
    mine, theirs = (
        {name: to_local(x).clone() for name, x in m.state_dict().items()}
        for m in (model, reference)
    )
    return mine, theirs, full_tensors(dict(model.state_dict()), parallelism), everything


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(),
        MeshConfig(2, 2),
        MeshConfig(1, 2, 2),
        MeshConfig(2, 2, shard="fsdp"),
        MeshConfig(2, 2, 2, shard="fsdp"),
        MeshConfig(2, 1, 2, shard="hsdp"),
    ],
    ids=str,
)
def test_the_same_bits(ranks, mesh):
    for mine, theirs, together, everything in ranks.run(mesh, start):
        assert mine.keys() == theirs.keys() and together.keys() == everything.keys()
        for name, x in theirs.items():
            assert torch.equal(mine[name], x), name
        for name, x in everything.items():
            assert torch.equal(together[name], x), name
