"""Memory of a rank: on one rank that of the process, on several a share of it."""

from dataclasses import replace

import pytest

from headway.config import Config, DataConfig, OptimConfig, RunConfig
from headway.model.costs import CostGroup
from headway.plan import memory as m
from headway.plan.cost import Items, model_costs, total
from headway.plan.layout import MeshLayout
from headway.plan.memory import MemoryPart
from tests.plan.test_memory import MODELS

DATA = DataConfig(seq_len=32, batch_size=16)


def config(name: str, **options) -> Config:
    return Config(model=MODELS[name], data=DATA, optim=OptimConfig(name="muon"), **options)


def memory(one: Config, layout: MeshLayout, micro: int, b: int, imbalance: float = 1.0) -> Items:
    return m.memory(one, model_costs(one, micro, b), layout, micro, b, imbalance)


def items(parts: Items):
    return {i.part: i.value for i in parts}


@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_one_rank_is_one_process(name, b):
    one = config(name, run=RunConfig(recompute=b == 2))
    costs = model_costs(one, 4, b)
    states = m.states(costs, MeshLayout(), one.optim)
    assert memory(one, MeshLayout(), 4, b) == (*states, *costs.saved)


def test_states_follow_the_parameters():
    whole = items(memory(config("multi-head latent"), MeshLayout(), 4, 4))
    heads = items(memory(config("multi-head latent"), MeshLayout(hp=2), 4, 4))
    experts = 3 * 2 * 8 * 3 * 20 * 16  # layers, heads, experts, matrices, F, L
    routers = 3 * 2 * 8 * 16
    assert whole[MemoryPart.WEIGHTS] - heads[MemoryPart.WEIGHTS] == 4 * (experts + routers) / 2
    assert whole[MemoryPart.MUON] - heads[MemoryPart.MUON] == 4 * experts / 2
    assert whole[MemoryPart.ADAMW] - heads[MemoryPart.ADAMW] == 8 * routers / 2
    for group in (CostGroup.EXPERTS, CostGroup.MIXER, CostGroup.SUB_TOKENS):
        assert whole[group] == heads[group]  # as many sub-tokens, of fewer heads


def test_sharding_divides_states_and_gathers_two_layers():
    one = config("multi-head latent")
    whole = items(memory(one, MeshLayout(), 4, 2))
    shard = items(memory(one, MeshLayout(dp=4, shard=True), 4, 2))
    n = items(model_costs(one, 1).parameters)
    small = n[CostGroup.NORMS] + n[CostGroup.ROUTERS]  # are replicated, and AdamW's
    bytes_of = {
        MemoryPart.WEIGHTS: 4,
        MemoryPart.GRADIENTS: 4,
        MemoryPart.ADAMW: 8,
        MemoryPart.MUON: 4,
    }
    for part, b in bytes_of.items():
        replicated = 0 if part is MemoryPart.MUON else b * small
        assert shard[part] == pytest.approx((whole[part] - replicated) / 4 + replicated)
    assert CostGroup.CASTS in whole and CostGroup.CASTS not in shard
    ends, experts = n[CostGroup.EMBEDDING], n[CostGroup.EXPERTS]
    blocks = sum(n.values()) - small - ends - experts
    # two layers of weights and one of gradients: 2 bytes each, of experts 4
    layers = (2 * 2 * blocks + 2 * blocks + 2 * 4 * experts + 4 * experts) / 3
    assert shard[MemoryPart.GATHERED] == max(layers, 8 * ends)
    heads = items(memory(one, MeshLayout(hp=4, shard=True), 4, 2))
    assert heads[MemoryPart.GATHERED] == max(2 * blocks, 8 * ends)  # nobody else has these experts
    replicated = items(memory(one, MeshLayout(dp=4), 4, 2))
    assert replicated == whole


def test_received_sub_tokens():
    """3 layers · 128 tokens · 2 heads · width 16, K = 3, float32, indices of 2 and gates of 4."""
    one, n = config("multi-head latent"), 3 * 128 * 2
    received = {
        scheme: items(memory(one, MeshLayout(ep=2, scheme=scheme), 4, 4))[MemoryPart.RECEIVED]
        for scheme in ("all_to_all", "all_to_all_per_slot", "all_gather")
    }
    assert received["all_gather"] == n * 2 * (64 + 18)
    assert received["all_to_all_per_slot"] == n * 3 * 64
    assert received["all_to_all"] == n * 2 * (1 - 0.5**3) * (64 + 18)
    assert MemoryPart.RECEIVED not in items(memory(one, MeshLayout(hp=2), 4, 4))


def test_a_busy_rank_keeps_more_rows():
    one = config("multi-head latent")
    layout = MeshLayout(ep=2, scheme="all_gather")
    even, busy = memory(one, layout, 4, 4), memory(one, layout, 4, 4, 1.25)
    rows = items(even)[CostGroup.EXPERTS] + items(even)[CostGroup.PERMUTATION]
    assert total(busy) - total(even) == pytest.approx(rows / 4)
    dp = replace(layout, dp=2, ep=1, scheme=None)
    assert memory(one, dp, 4, 4, 1.25) == memory(one, dp, 4, 4)
