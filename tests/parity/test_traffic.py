"""The ledger counts what the formulas of plan.traffic predict, byte for byte."""

import gc
from dataclasses import replace

import pytest
import torch

from headway.config import Config, MeshConfig, RouterConfig
from headway.data.batch import Batch, micro_batches
from headway.model.compute import Compute
from headway.model.costs import CostGroup
from headway.model.transformer import Transformer
from headway.parallel.collectives import AsyncCollective
from headway.parallel.parallelize import parallelize
from headway.plan import traffic
from headway.plan.cost import model_costs
from headway.plan.layout import MeshLayout
from headway.plan.machine import MACHINES
from headway.plan.setting import Setting
from headway.plan.traffic import TokenExchange
from headway.plan.volume import comm_volumes
from headway.train.objective import NextToken
from headway.train.step import gradient
from tests.parity.test_parity import ROWS, Case, flat, heads, latent, rows_of

S = 8
"""Tokens of a row."""


def count(mesh, case: Case, dtype=torch.float32):
    """One step; bytes by purpose, and the ledger's counts."""
    model = Transformer(case.model, Compute(dtype=dtype), seed=0)
    parallelism = parallelize(model, mesh)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(32, (2, ROWS, S), generator=generator)
    mine = rows_of(mesh, ROWS // mesh.size)
    batch = Batch(tokens[mine], targets[mine], None)
    micros = micro_batches(batch, case.micro or len(mine), torch.device("cpu"))
    gradient(model, micros, NextToken(case.model.moe.balance), parallelism)
    entries = {tuple(key): c.bytes for key, c in mesh.traffic.counts.items()}
    return {key: c["bytes"] for key, c in mesh.traffic.take().items()}, entries


def tokens_of(mesh: MeshConfig) -> int:
    return ROWS * S // (mesh.dp * mesh.hp * mesh.ep)


def trips(counted, axis, there, back):
    """In the order of `traffic.ExchangeBytes`."""
    keys = (there, back, f"{back} backward", f"{there} backward")
    return tuple(counted[f"{axis} {key}"] for key in keys)


def by_layer(counted, entries, axis, there, back, want):
    """Each layer sent what the formula says of one layer, in both directions, and all of them what
    was counted without layers."""
    keys = (there, back, f"{back} backward", f"{there} backward")
    for key, n_bytes in zip(keys, want, strict=True):
        layers = {layer: n for (a, k, layer), n in entries.items() if (a, k) == (axis, key)}
        assert layers == {0: n_bytes, 1: n_bytes}, key
        assert sum(layers.values()) == counted[f"{axis} {key}"]
    for (a, key, layer), _ in entries.items():
        assert (layer is None) == (a not in ("hp", "ep")), key


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("reads", ["sub_token", "token"])
@pytest.mark.parametrize("mesh", [MeshConfig(hp=4), MeshConfig(dp=2, hp=2)], ids=str)
def test_head_parallel(ranks, mesh, reads, chunks):
    model = heads(router=RouterConfig(reads=reads), top_k=3)
    mesh = MeshConfig(mesh.dp, mesh.hp, mesh.ep, chunks=chunks)
    want = traffic.expected_bytes(model, TokenExchange.HEADS, tokens_of(mesh), mesh.hp, 4)
    for counted, entries in ranks.run(mesh, count, Case(model, mesh)):
        assert trips(counted, "hp", "scatter", "gather") == tuple(model.n_sparse * x for x in want)
        by_layer(counted, entries, "hp", "scatter", "gather", want)


@pytest.mark.parametrize("reads", ["sub_token", "token"])
def test_head_parallel_in_float8(ranks, reads):
    """One byte a value and four a sub-token, in all four exchanges."""
    model = heads(router=RouterConfig(reads=reads), top_k=3)
    mesh = MeshConfig(hp=4, payload="float8")
    want = traffic.expected_bytes(model, TokenExchange.HEADS, tokens_of(mesh), 4, 1)
    assert want.combine == tokens_of(mesh) * 4 * (model.moe.head_width(model.d_model) + 4) * 3 // 4
    for counted, _ in ranks.run(mesh, count, Case(model, mesh)):
        assert trips(counted, "hp", "scatter", "gather") == tuple(model.n_sparse * x for x in want)


def test_head_parallel_does_not_grow_with_k(ranks):
    mesh = MeshConfig(hp=4)
    once, often = (ranks.run(mesh, count, Case(heads(top_k=k), mesh))[0][0] for k in (2, 8))
    assert trips(once, "hp", "scatter", "gather") == trips(often, "hp", "scatter", "gather")


@pytest.mark.parametrize("payload", ["matmul", "float8"])
@pytest.mark.parametrize("model", [flat(), latent(), heads()], ids=["flat", "latent", "heads"])
def test_all_gather(ranks, model, payload):
    mesh = MeshConfig(ep=4, ep_scheme="all_gather", payload=payload)
    b = traffic.payload_bytes(mesh, 4)
    want = traffic.expected_bytes(model, TokenExchange.ALL_GATHER, tokens_of(mesh), 4, b)
    for counted, entries in ranks.run(mesh, count, Case(model, mesh)):
        assert trips(counted, "ep", "dispatch", "combine") == tuple(
            model.n_sparse * x for x in want
        )
        by_layer(counted, entries, "ep", "dispatch", "combine", want)


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("model", [flat(), latent(), heads()], ids=["flat", "latent", "heads"])
def test_all_to_all_follows_the_rows(ranks, model, dedup):
    """The rows are read off one trip; the other three and their sum over ranks must agree."""
    mesh = MeshConfig(ep=4, ep_scheme="all_to_all", dedup=dedup)
    exchange = TokenExchange.PER_RANK if dedup else TokenExchange.PER_SLOT
    sub_token = traffic.sub_token(model, exchange, 4, 4)
    width, top_k = model.moe.head_width(model.d_model), model.moe.top_k
    answers = [counted for counted, _ in ranks.run(mesh, count, Case(model, mesh))]
    leaving = 0
    for counted in answers:
        row = width * 4 + (top_k * (2 + 4) if dedup else 2)  # indices of 2 bytes, gates of 4
        rows, rest = divmod(counted["ep dispatch"], row)
        assert rest == 0
        leaving += rows
        assert counted["ep counts"] == model.n_sparse * traffic.count_bytes(4)
        want = sub_token.sent(rows)
        exchanged = trips(counted, "ep", "dispatch", "combine")
        # a rank sends its rows there and their gradients; outputs leave from where rows arrived
        assert (exchanged[0], exchanged[2]) == (want.dispatch, want.combine_backward)
    both = sum(f["ep combine"] for f in answers), sum(f["ep combine backward"] for f in answers)
    assert both == (leaving * width * 4, leaving * width * 4)
    slots = ROWS * S * model.moe.n_heads * model.n_sparse
    most = top_k if not dedup else min(top_k, 3)
    assert 0 < leaving <= slots * most


def test_gradients_of_replicated_parameters(ranks):
    mesh, model = MeshConfig(hp=4), heads()
    costs = model_costs(Config(model=model), 1)
    split = (CostGroup.EXPERTS, CostGroup.ROUTERS)
    shared = sum(item.value for item in costs.parameters if item.part not in split)
    for counted, entries in ranks.run(mesh, count, Case(model, mesh)):
        assert {key[2] for key in entries if key[:2] == ("world", "gradients")} == {None}
        assert counted["world gradients"] == traffic.all_reduce_bytes(int(shared), 4)


def test_the_first_layer_may_be_dense(ranks):
    """Layers are counted as blocks of the model are numbered."""
    model = heads()
    model = replace(model, n_layers=3, moe=replace(model.moe, n_dense_layers=1))
    mesh = MeshConfig(hp=2)
    for _, entries in ranks.run(mesh, count, Case(model, mesh)):
        assert {layer for _, _, layer in entries} == {None, 1, 2}


@pytest.mark.parametrize("shard", ["fsdp", "hsdp"])
def test_what_fsdp_sends_belongs_to_the_block(ranks, shard):
    mesh = MeshConfig(dp=2, hp=2, shard=shard)
    for counted, entries in ranks.run(mesh, count, Case(heads(), mesh)):
        sums = [
            sum(n for (_, key, at), n in entries.items() if key.startswith("fsdp") and at == layer)
            for layer in (None, 0, 1)
        ]
        assert sums[1] == sums[2] > 0 and sums[0] > 0
        assert sum(sums) == sum(n for key, n in counted.items() if " fsdp " in key)


PREFIX = {
    "weights gathered": "fsdp all-gather",
    "gradients reduce-scattered": "fsdp reduce-scatter",
}


@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        (heads(), MeshConfig(dp=4)),
        (heads(), MeshConfig(dp=2, hp=2)),
        (heads(router=RouterConfig(reads="token"), d_shared=16), MeshConfig(dp=2, hp=2)),
        (heads(), MeshConfig(hp=4)),
        (flat(), MeshConfig(dp=2, ep=2, ep_scheme="all_gather", chunks=2)),
    ],
    ids=str,
)
def test_plan_says_what_fsdp_sends(ranks, model, mesh, micro, b):
    """Weights, gradients and tokens of a step, byte for byte, by axis."""
    mesh = replace(mesh, shard="fsdp")
    layout = MeshLayout(
        mesh.dp, mesh.hp, mesh.ep, "all_gather" if mesh.ep > 1 else None, shard=True
    )
    T, passes = tokens_of(mesh), ROWS // 4 // (micro or ROWS // 4)
    want: dict[tuple[str, str], float] = {}
    config = Config(model=model)
    setting = Setting(config, MACHINES["cpu"], bytes_per_value=b, chunks=max(mesh.chunks, 1))
    for part in comm_volumes(setting, model_costs(config, 1), layout, T, passes):
        purpose = PREFIX.get(part.name.partition(",")[0], "gradients")
        key = (part.axis, "" if part.kind == "tokens" else purpose)
        want[key] = want.get(key, 0) + part.bytes
    dtype = {2: torch.bfloat16, 4: torch.float32}[b]
    for _, entries in ranks.run(mesh, count, Case(model, mesh, micro=micro), dtype):
        actual: dict[tuple[str, str], float] = {}
        for (axis, purpose, _), n in entries.items():
            key = (axis, "" if axis in ("hp", "ep") else purpose)
            if purpose not in ("targets", "norm", "statistics", "counts") and n:
                actual[key] = actual.get(key, 0) + n
        assert actual == want


def collectives_left(mesh, case: Case) -> int:
    """Exchanges that are still in memory after a step, without the garbage collector's help."""
    gc.collect()
    gc.disable()
    try:
        count(mesh, case)
        return sum(isinstance(o, AsyncCollective) for o in gc.get_objects())
    finally:
        gc.enable()


@pytest.mark.parametrize("mesh", [MeshConfig(hp=2, ep=2, chunks=2), MeshConfig(ep=4)], ids=str)
def test_an_exchange_does_not_outlive_its_step(ranks, mesh):
    """One that did kept the graph of the step, 20 MB per step of the demo."""
    assert ranks.run(mesh, collectives_left, Case(heads(), mesh)) == [0] * 4
