"""Routes reported and replayed on a mesh, experts that do nothing, and modules of a user's own: as in
one process."""

from dataclasses import replace

import pytest
import torch

from headway.config import MeshConfig, RouterConfig
from headway.model.build import build_block
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.transformer import Transformer
from headway.parallel.parallelize import parallelize
from tests.model.own_modules import own_blocks
from tests.parity.test_parity import ROWS, close, heads, rows_of

ALL = frozenset({"routes", "logits", "norms"})
MESHES = [
    MeshConfig(hp=2),
    MeshConfig(ep=2),
    MeshConfig(hp=2, ep=2, chunks=2),
    MeshConfig(dp=2, ep=2, ep_scheme="all_gather"),
    MeshConfig(hp=2, ep=2, dedup=False, ep_scheme="all_to_all"),
]


def forward(mesh, config, replay, blocks=build_block):
    """The report of a forward pass over this rank's rows, replaying a selection if one is given."""
    model = Transformer(config, Compute(torch.float64), seed=0, blocks=blocks).double()
    parallelism = parallelize(model, mesh)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, (ROWS, 8), generator=generator)
    mine = rows_of(mesh, ROWS // mesh.size)
    if replay:
        rows = torch.arange(ROWS * 8).view(ROWS, 8)[mine].flatten()
        replay = tuple(index_THK[rows] for index_THK in replay)
    ctx = Context(dispatcher=parallelism.dispatcher, report=ALL, replay=replay)
    with torch.no_grad():
        out = model(tokens[mine], ctx=ctx)
    return mine, out.logits_BSV, [list(report) for report in out.routes]


def compare(ranks, mesh, config, replay=(), blocks=build_block):
    ((_, logits, reports),) = ranks.run(MeshConfig(), forward, config, replay, blocks)
    for mine, local, local_reports in ranks.run(mesh, forward, config, replay, blocks):
        close(local, logits[mine], "logits")
        for whole, part in zip(reports, local_reports, strict=True):
            for a, b in zip(part, whole, strict=True):
                expected = b.unflatten(0, (ROWS, 8))[mine].flatten(0, 1)
                if not a.is_floating_point():
                    assert torch.equal(a.long(), expected.long())
                else:
                    # norms are float32
                    assert torch.allclose(a, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reads", ["sub_token", "token"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_reports_are_those_of_one_process(ranks, mesh, reads):
    config = heads()
    moe = replace(config.moe, router=RouterConfig(reads=reads))
    compare(ranks, mesh, replace(config, moe=moe))


@pytest.mark.parametrize("reads", ["sub_token", "token"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_selection_is_replayed_on_a_mesh(ranks, mesh, reads):
    config = heads()
    moe = replace(config.moe, router=RouterConfig(reads=reads))
    config = replace(config, moe=moe)
    generator = torch.Generator().manual_seed(1)
    replay = tuple(
        torch.rand(ROWS * 8, moe.n_heads, moe.n_experts, generator=generator)
        .topk(moe.top_k)
        .indices
        for _ in range(config.n_sparse)
    )
    compare(ranks, mesh, config, replay)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_experts_that_do_nothing_on_a_mesh(ranks, mesh):
    config = heads()
    compare(ranks, mesh, replace(config, moe=replace(config.moe, n_zero_experts=3)))


@pytest.mark.parametrize(
    "mesh", [MeshConfig(hp=2), MeshConfig(hp=2, ep=2), MeshConfig(dp=2, shard="fsdp")], ids=str
)
def test_modules_of_ones_own_on_a_mesh(ranks, mesh):
    """A mixer, experts and a residual of a test file are split, sharded and exchanged by roles."""
    compare(ranks, mesh, heads(), blocks=own_blocks)
