"""Memory of a rank: on one rank that of `plan.memory`, on several a share of it."""

from dataclasses import replace

import pytest

from headway.config import Config, DataConfig, OptimConfig, RunConfig
from headway.plan.cost import parameters
from headway.plan.layout import MeshLayout
from headway.plan.memory import activations, states
from headway.plan.rank_memory import CAST, GATHERED, memory
from headway.plan.shape import total
from tests.plan.test_memory import MODELS

DATA = DataConfig(seq_len=32, batch_size=16)
RECEIVED = "sub-tokens received from the ep axis"


def config(name: str, **options) -> Config:
    return Config(model=MODELS[name], data=DATA, optim=OptimConfig(name="muon"), **options)


def items(found):
    return {i.name: i.value for i in found}


@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_one_rank_is_one_process(name, b):
    one = config(name, run=RunConfig(recompute=b == 2))
    kept = activations(MODELS[name], 4, 32, bytes_per_value=b, recompute=b == 2)
    found = memory(one, MeshLayout(), 4, b)
    assert items(found) == items((*states(one), *kept))


def test_states_follow_the_parameters():
    whole = items(memory(config("multi-head latent"), MeshLayout(), 4, 4))
    heads = items(memory(config("multi-head latent"), MeshLayout(hp=2), 4, 4))
    experts = 3 * 2 * 8 * 3 * 20 * 16  # layers, heads, experts, matrices, F, L
    routers = 3 * 2 * 8 * 16
    assert whole["weights"] - heads["weights"] == 4 * (experts + routers) / 2
    assert whole["Muon momentum"] - heads["Muon momentum"] == 4 * experts / 2
    assert whole["AdamW moments"] - heads["AdamW moments"] == 8 * routers / 2
    for name in ("experts", "attention", "sub-tokens and expert outputs"):
        assert whole[name] == heads[name]  # as many sub-tokens, of fewer heads


def test_sharding_divides_states_and_gathers_two_layers():
    one = config("multi-head latent")
    whole = items(memory(one, MeshLayout(), 4, 2))
    shard = items(memory(one, MeshLayout(dp=4, shard=True), 4, 2))
    n = {item.name: item.value for item in parameters(MODELS["multi-head latent"])}
    small = n["norms"] + n["routers"]  # stay whole, and are AdamW's
    for name, b in {"weights": 4, "gradients": 4, "AdamW moments": 8, "Muon momentum": 4}.items():
        kept = 0 if name == "Muon momentum" else b * small
        assert shard[name] == pytest.approx((whole[name] - kept) / 4 + kept)
    assert CAST in whole and CAST not in shard
    ends = n["embedding and output head"]
    blocks = sum(n.values()) - small - ends - n["experts"]
    # two layers of weights and one of gradients: 2 bytes each, of experts 4
    layers = (2 * 2 * blocks + 2 * blocks + 2 * 4 * n["experts"] + 4 * n["experts"]) / 3
    assert shard[GATHERED] == max(layers, 8 * ends)
    heads = items(memory(one, MeshLayout(hp=4, shard=True), 4, 2))
    assert heads[GATHERED] == max(2 * blocks, 8 * ends)  # nobody else has these experts
    replicated = items(memory(one, MeshLayout(dp=4), 4, 2))
    assert replicated == whole


def test_received_sub_tokens():
    """3 layers · 128 tokens · 2 heads · width 16, K = 3, float32, indices of 2 and gates of 4."""
    one, n = config("multi-head latent"), 3 * 128 * 2
    found = {
        scheme: items(memory(one, MeshLayout(ep=2, scheme=scheme), 4, 4))[RECEIVED]
        for scheme in ("all_to_all", "all_to_all_per_slot", "all_gather")
    }
    assert found["all_gather"] == n * 2 * (64 + 18)
    assert found["all_to_all_per_slot"] == n * 3 * 64
    assert found["all_to_all"] == n * 2 * (1 - 0.5**3) * (64 + 18)
    assert RECEIVED not in items(memory(one, MeshLayout(hp=2), 4, 4))


def test_a_busy_rank_keeps_more_rows():
    one = config("multi-head latent")
    layout = MeshLayout(ep=2, scheme="all_gather")
    even, busy = memory(one, layout, 4, 4), memory(one, layout, 4, 4, 1.25)
    rows = items(even)["experts"] + items(even)["sorted rows"]
    assert total(busy) - total(even) == pytest.approx(rows / 4)
    dp = replace(layout, dp=2, ep=1, scheme=None)
    assert memory(one, dp, 4, 4, 1.25) == memory(one, dp, 4, 4)
