"""Meshes against brute force, and what a rank holds against hand counts."""

from dataclasses import replace

import pytest

from headway.config import Config, DataConfig, ModelConfig, MoEConfig, RouterConfig, UsageError
from headway.model.roles import Group, SplitOver
from headway.plan.cost import ModelCosts, model_costs, total
from headway.plan.layout import MeshLayout, auto_chunks, illegal, meshes, micro_batch, stored, used
from tests.plan.test_memory import MODELS

WIDE = ModelConfig(
    vocab_size=64, n_layers=2, d_model=48, moe=MoEConfig(n_heads=12, n_experts=10, top_k=2)
)


@pytest.mark.parametrize("n", [1, 2, 6, 24, 64])
def test_every_mesh_once(n):
    brute = {
        (dp, hp, ep)
        for dp in range(1, n + 1)
        for hp in range(1, n + 1)
        for ep in range(1, n + 1)
        if dp * hp * ep == n
    }
    listed = [(m.dp, m.hp, m.ep) for m in meshes(n)]
    assert len(listed) == len(brute) and set(listed) == brute


@pytest.mark.parametrize("n", [6, 40])
def test_legal_meshes_divide_heads_and_experts(n):
    legal = {(m.dp, m.hp, m.ep) for m in meshes(n) if not illegal(WIDE, m)}
    brute = {(m.dp, m.hp, m.ep) for m in meshes(n) if 12 % m.hp == 0 and 10 % m.ep == 0}
    assert legal == brute and 1 < len(legal) < len(list(meshes(n)))


@pytest.mark.parametrize(
    ("model", "layout", "words"),
    [
        (WIDE, MeshLayout(hp=5), "hp=5 does not divide n_heads=12; use hp=1, 2, 3, 4, 6 or 12"),
        (WIDE, MeshLayout(hp=24), "hp=24 does not divide n_heads=12"),
        (WIDE, MeshLayout(ep=4), "ep=4 does not divide n_experts=10; use ep=1, 2, 5 or 10"),
        (MODELS["flat"], MeshLayout(hp=2), "hp needs multi_head_latent: hp=2 and kind=moe"),
        (MODELS["dense"], MeshLayout(ep=2), "ep needs experts: ep=2 and every layer is dense"),
        (MODELS["dense"], MeshLayout(hp=2), "hp needs multi_head_latent: hp=2 and kind=dense"),
        (
            replace(WIDE, moe=replace(WIDE.moe, n_dense_layers=2)),
            MeshLayout(hp=2),
            "hp needs multi_head_latent: hp=2 and kind=dense",
        ),
    ],
)
def test_reasons(model, layout, words):
    assert illegal(model, layout).startswith(words)


def test_axes_and_nodes():
    """ep innermost: 2·4·4 ranks in nodes of 8 keep ep inside and nothing else."""
    layout = MeshLayout(dp=2, hp=4, ep=4)
    axes = ("dp", "hp", "ep", "routers", "world")
    assert [layout.size(a) for a in axes] == [2, 4, 4, 8, 32]
    assert [layout.in_one_node(a, 8) for a in axes] == [False, False, True, False, False]
    assert [layout.in_one_node(a, 16) for a in axes] == [False, True, True, False, False]
    assert [layout.in_one_node(a, 32) for a in axes] == [True] * 5
    # blocks of 3 in nodes of 8: the third block lies in two nodes
    assert not MeshLayout(dp=4, ep=3).in_one_node("ep", 8) and MeshLayout(dp=2, ep=3).in_one_node(
        "ep", 8
    )


def costs_of(model: ModelConfig) -> ModelCosts:
    return model_costs(Config(model=model), 1)


def n_stored(costs: ModelCosts, layout: MeshLayout) -> float:
    return sum(stored(weights, layout) for weights in costs.weights)


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_holds_the_model(name):
    costs = costs_of(MODELS[name])
    for layout in (MeshLayout(), MeshLayout(shard=True)):
        assert sum(used(costs, layout).values()) == total(costs.parameters)
        assert n_stored(costs, layout) == total(costs.parameters)


def test_what_a_rank_holds():
    """dp 3 · hp 4 · ep 5: experts / 20, sub-token routers / 4; sharded by 3 and 60 besides, but for
    norms and routers."""
    layout = MeshLayout(3, 4, 5, "all_to_all")
    sharded = replace(layout, shard=True)
    costs = costs_of(WIDE)
    small = (Group.VECTOR, Group.ROUTER)
    for weights in costs.weights:
        split = {SplitOver.EXPERTS: 20, SplitOver.HEADS: 4}.get(weights.shard, 1)
        n = weights.count
        assert stored(weights, layout) == n / split
        expected = n / split if weights.group in small else n / 60
        assert stored(weights, sharded) == pytest.approx(expected)
    assert sum(used(costs, layout).values()) == n_stored(costs, layout)
    assert {weights.shard for weights in costs.weights} == set(SplitOver)
    token = replace(WIDE, moe=replace(WIDE.moe, router=RouterConfig(reads="token")))
    assert SplitOver.HEADS not in {weights.shard for weights in costs_of(token).weights}


def config(batch: int, micro: int) -> Config:
    return Config(data=DataConfig(batch_size=batch, micro_batch_size=micro))


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [
        (64, 0, 4, (16, 1)),
        (64, 4, 4, (4, 4)),
        (64, 8, 16, (4, 1)),  # no more than a rank has
        (24, 4, 4, (3, 2)),  # 6 sequences in threes, not in fours
        (8, 8, 1, (8, 1)),
    ],
)
def test_micro_batch(batch, micro, ranks, expected):
    assert micro_batch(config(batch, micro), ranks) == expected


def test_a_batch_that_ranks_cannot_share():
    with pytest.raises(UsageError, match=r"batch_size=8 does not divide among --gpus 3; use .* 9"):
        micro_batch(config(8, 0), 3)


def test_chunks_are_chosen_by_where_the_ep_axis_lies():
    two = {
        (layout, per_node)
        for layout in (
            MeshLayout(dp=4),
            MeshLayout(hp=4),
            MeshLayout(ep=4, scheme="all_to_all"),
            MeshLayout(ep=4, scheme="all_to_all_per_slot"),
            MeshLayout(ep=4, scheme="all_gather"),
            MeshLayout(hp=2, ep=2, scheme="all_to_all"),
            MeshLayout(dp=2, ep=2, scheme="all_to_all", shard=True),
        )
        for per_node in (1, 2, 4)
        if auto_chunks(layout, per_node)[0] == 2
    }
    assert two == {
        *((MeshLayout(ep=4, scheme="all_to_all"), n) for n in (1, 2)),
        *((MeshLayout(ep=4, scheme="all_to_all_per_slot"), n) for n in (1, 2)),
        (MeshLayout(hp=2, ep=2, scheme="all_to_all"), 1),
    }
    assert "spans nodes" in auto_chunks(MeshLayout(ep=4, scheme="all_to_all"), 1)[1]
