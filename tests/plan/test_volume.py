"""What a rank sends in a step, against hand numbers."""

from dataclasses import replace

import pytest

from headway.config import Config, ModelConfig, MoEConfig, RouterConfig
from headway.model.costs import CostGroup
from headway.plan.cost import ModelCosts, model_costs
from headway.plan.layout import MeshLayout
from headway.plan.machine import MACHINES
from headway.plan.setting import Setting
from headway.plan.volume import comm_volumes, ep_totals
from tests.plan.test_memory import MODELS

MODEL = ModelConfig(
    vocab_size=64,
    n_layers=3,
    d_model=32,
    n_heads=4,
    moe=MoEConfig(n_heads=4, n_experts=8, top_k=2, d_expert=8, n_dense_layers=1),
)
T = 128  # of a rank, in 4 passes


def costs_of(model=MODEL) -> ModelCosts:
    return model_costs(Config(model=model), 1)


def volumes_of(layout, model=MODEL, passes=4, b=2, chunks=1, imbalance=1.0):
    config = Config(model=model)
    setting = Setting(config, MACHINES["h100"], 8, b, chunks, imbalance)
    return comm_volumes(setting, costs_of(model), layout, T, passes)


def by_name(layout, model=MODEL, **options):
    return {w.name: w for w in volumes_of(layout, model, **options)}


def n_of(*groups):
    return sum(int(i.value) for i in costs_of().parameters if i.part in groups)


def test_one_rank_sends_nothing():
    for layout in (MeshLayout(), MeshLayout(shard=True)):
        assert volumes_of(layout) == []


def test_head_parallel():
    """2 sparse layers · 128 tokens · 32 values of 2 bytes, a half of it, four times."""
    volumes = by_name(MeshLayout(hp=2))
    assert volumes["Head Parallel"].bytes == 2 * 4 * T * 32 * 2 // 2
    assert volumes["Head Parallel"].messages == 4 * 2 * 4
    token = replace(MODEL, moe=replace(MODEL.moe, router=RouterConfig(reads="token")))
    more = by_name(MeshLayout(hp=2), token)["Head Parallel"].bytes - volumes["Head Parallel"].bytes
    assert more == 2 * T * 4 * 2 * (2 + 4 + 4) // 2


def test_head_parallel_by_gradients():
    """hp = 4: no rank shares experts, so none of their gradients are sent; routers neither."""
    volumes = by_name(MeshLayout(hp=4))
    assert set(volumes) == {"Head Parallel", "gradients all-reduced, replicated"}
    n = n_of(*CostGroup) - n_of(CostGroup.EXPERTS, CostGroup.ROUTERS)
    assert volumes["gradients all-reduced, replicated"].bytes == 2 * 4 * n * 3 // 4
    assert volumes["gradients all-reduced, replicated"].messages == 6


@pytest.mark.parametrize("chunks", [1, 2])
def test_expert_parallel(chunks):
    """N = 512 sub-tokens of width 8 in bfloat16, K = 2, two sparse layers."""
    slots = by_name(MeshLayout(ep=2, scheme="all_to_all_per_slot"), chunks=chunks)
    assert slots["Expert Parallel, one copy per slot"].bytes == 2 * 512 * (4 * 16 + 2)
    assert slots["counts of rows"].bytes == 2 * 4 * chunks * 8
    once = by_name(MeshLayout(ep=2, scheme="all_to_all"), chunks=chunks)
    rows = 512 * 1.5 / 2
    assert once["Expert Parallel, one copy per rank"].bytes == 2 * rows * (4 * 16 + 2 * 10)
    gathered = by_name(MeshLayout(ep=2, scheme="all_gather"), chunks=chunks)
    assert gathered["Expert Parallel, all-gather"].bytes == 2 * 512 * (4 * 16 + 2 * 10)
    assert "counts of rows" not in gathered
    assert gathered["Expert Parallel, all-gather"].messages == 2 * 4 * chunks * 4


def test_imbalance_grows_what_follows_the_router():
    for scheme, factor in (("all_to_all", 1.5), ("all_to_all_per_slot", 1.5), ("all_gather", 1)):
        layout = MeshLayout(ep=2, scheme=scheme)
        even = sum(w.bytes for w in by_name(layout).values() if w.name.startswith("Expert"))
        busy = by_name(layout, imbalance=1.5).values()
        assert sum(w.bytes for w in busy if w.name.startswith("Expert")) == factor * even


def test_totals_by_scheme_include_the_counts():
    for scheme, value in ep_totals(MODEL, MeshLayout(ep=4), T, 4, 2).items():
        volumes = volumes_of(MeshLayout(ep=4, scheme=scheme))
        assert value == sum(w.bytes for w in volumes if w.kind == "tokens")


def test_fsdp_gathers_twice_and_scatters_once_a_pass():
    volumes = by_name(MeshLayout(dp=2, hp=2, shard=True))
    ends, small = n_of(CostGroup.EMBEDDING), n_of(CostGroup.NORMS)
    experts, routers_ = n_of(CostGroup.EXPERTS), n_of(CostGroup.ROUTERS)
    n = n_of(*CostGroup) - experts - routers_ - small - ends
    assert volumes["weights gathered, replicated"].bytes == 4 * 2 * 2 * n * 3 // 4
    assert volumes["weights gathered, replicated"].messages == 4 * 2 * 3 * 3
    assert volumes["gradients reduce-scattered, replicated"].bytes == 4 * 4 * n * 3 // 4
    assert volumes["weights gathered, embedding and head"].bytes == 4 * 2 * ends * 3 // 4
    assert volumes["gradients reduce-scattered, embedding and head"].bytes == 4 * 4 * ends * 3 // 4
    assert volumes["weights gathered, experts"].bytes == 4 * 2 * 2 * (experts // 2) // 2
    assert volumes["weights gathered, experts"].messages == 4 * 2 * 2
    routers = volumes["gradients all-reduced, routers"]
    assert (routers.bytes, routers.axis) == (2 * 4 * (routers_ // 2) // 2, "routers")
    assert volumes["gradients all-reduced, norms and routers"].bytes == 2 * 4 * small * 3 // 4
    again = by_name(MeshLayout(dp=2, hp=2, shard=True), chunks=2)["weights gathered, experts"]
    assert again.bytes == 2 * volumes["weights gathered, experts"].bytes


def test_a_dense_model_sends_gradients_alone():
    volumes = volumes_of(MeshLayout(dp=2), MODELS["dense"], passes=1, b=4)
    assert [(w.name, w.axis) for w in volumes] == [("gradients all-reduced, replicated", "world")]
