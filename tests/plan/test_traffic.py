"""Bytes on the network: against hand calculation and against a simulated choice of experts."""

from dataclasses import replace

import numpy as np
import pytest

from headway.config import ModelConfig, MoEConfig, RouterConfig
from headway.plan import traffic as t
from headway.plan.traffic import TokenExchange, expected_bytes, sub_token, traffic_per_token

HEADS, PER_SLOT, PER_RANK, ALL_GATHER = TokenExchange

MODEL = ModelConfig(
    vocab_size=64, n_layers=2, d_model=256, moe=MoEConfig(n_heads=8, n_experts=64, top_k=4)
)


def items(model, **options):
    return {i.name: i.value for i in traffic_per_token(model, **options)}


def test_by_hand():
    """D_L 256 = 8·32 in bfloat16, P = 8, K = 4, indices of 2 bytes."""
    sent = items(MODEL, n_ranks=8)
    assert sent["Head Parallel"] == 4 * 256 * 2 * 7 / 8
    assert sent["Expert Parallel"] == 4 * sent["Head Parallel"] + 8 * 4 * 2 * 7 / 8
    assert sent["Expert Parallel, all-gather"] == 8 * 7 * (4 * 32 * 2 + 4 * (2 + 8))
    # research: P = 8, k = 4 → 3.31 ranks
    once = sent["Expert Parallel, one copy per rank"]
    assert once == pytest.approx(3.31 * 8 * 7 / 8 * (4 * 32 * 2 + 4 * 10), rel=0.002)
    forward = {way: sum(expected_bytes(MODEL, way, 1, 8, 2)[:2]) for way in TokenExchange}
    assert forward[HEADS] == sent["Head Parallel"] / 2
    assert forward[PER_SLOT] == 8 * 4 * (2 * 32 * 2 + 2) * 7 / 8
    assert forward[ALL_GATHER] == 8 * 7 * (2 * 32 * 2 + 4 * (2 + 4))


def test_head_parallel_does_not_grow_with_k():
    more = replace(MODEL, moe=replace(MODEL.moe, top_k=16))
    assert items(more, n_ranks=4)["Head Parallel"] == items(MODEL, n_ranks=4)["Head Parallel"]
    assert (
        items(more, n_ranks=4)["Expert Parallel"] == 4 * items(MODEL, n_ranks=4)["Expert Parallel"]
    )


def test_router_on_the_whole_token_sends_indices_and_gates():
    token = replace(MODEL, moe=replace(MODEL.moe, router=RouterConfig(reads="token")))
    extra = items(token, n_ranks=8)["Head Parallel"] - items(MODEL, n_ranks=8)["Head Parallel"]
    assert extra == 10 * 8 * 4 * 7 / 8  # 2 of an index, 4 of a gate, 4 of its gradient


def test_expected_copies_by_simulation():
    """Distinct ranks among K independent choices of P ranks."""
    P, K = 8, 4
    ranks = np.random.default_rng(0).integers(0, P, (100_000, K))
    ranks.sort(axis=1)
    distinct = 1 + (np.diff(ranks, axis=1) > 0).sum(1)
    assert t.expected_ranks(K, P) == pytest.approx(distinct.mean(), rel=0.01)
    rows = {way: expected_bytes(MODEL, way, 100, P, 4).combine / (32 * 4) for way in TokenExchange}
    assert rows[PER_RANK] == pytest.approx(800 * distinct.mean() * 7 / 8, rel=0.01)
    assert rows[PER_SLOT] == 800 * 4 * 7 / 8


def test_latent_and_flat_and_dense():
    flat = replace(MODEL, moe=MoEConfig(kind="moe", n_experts=64, top_k=4))
    latent = replace(MODEL, moe=MoEConfig(kind="latent", n_experts=64, top_k=4, d_latent=64))
    wide, narrow = items(flat, n_ranks=8), items(latent, n_ranks=8)
    indices = 4 * 2 * 7 / 8
    assert wide["Expert Parallel"] - indices == 4 * (narrow["Expert Parallel"] - indices)
    assert "Head Parallel" not in items(flat, n_ranks=8)
    assert traffic_per_token(replace(MODEL, moe=MoEConfig(kind="dense")), 8) == ()


# per rank, from plain integers


def sizes(n_heads=4, n_experts=16, top_k=3, reads="sub_token", width=8):
    router = RouterConfig(reads=reads)
    moe = MoEConfig(n_heads=n_heads, n_experts=n_experts, top_k=top_k, router=router)
    return ModelConfig(vocab_size=64, n_layers=1, d_model=n_heads * width, moe=moe)


TOKEN = sizes(reads="token")


def test_heads_in_integers():
    """6 tokens, 4 heads of width 8, K = 3, P = 2, float32: 6·32·4 bytes, half of them leave."""
    trips = expected_bytes(sizes(), HEADS, 6, 2, 4)
    assert trips == (384, 384, 384, 384) and all(isinstance(n, int) for n in trips)
    token = expected_bytes(TOKEN, HEADS, 6, 2, 4)
    slots = 6 * 4 * 3 // 2
    assert token == (384 + slots * 6, 384, 384, 384 + slots * 4)
    assert token.total == 4 * 384 + slots * 10
    assert all(isinstance(n, int) for n in token)


def test_heads_in_float64_and_with_many_experts():
    """Gates are as wide as float64 values; an index needs 4 bytes from 32768 experts on."""
    slots = 6 * 4 * 3 // 2
    wide = expected_bytes(TOKEN, HEADS, 6, 2, 8)
    assert wide == (768 + slots * (2 + 8), 768, 768, 768 + slots * 8)
    many = expected_bytes(sizes(n_experts=8192, reads="token"), HEADS, 6, 2, 4)
    assert many.dispatch == 384 + slots * 8
    index = [sub_token(sizes(n_experts=n), PER_SLOT, 2, 4).indices for n in (8191, 8192)]
    assert index == [2, 4]


def test_rows_that_leave():
    """7 rows of width 8 in bfloat16 with K = 3."""
    once, slots = (sub_token(sizes(), way, 4, 2).sent(7) for way in (PER_RANK, PER_SLOT))
    assert once == (7 * (16 + 3 * 6), 7 * 16, 7 * 16, 7 * (16 + 3 * 4))
    assert slots == (7 * 18, 7 * 16, 7 * 16, 7 * 16)
    assert t.count_bytes(4) == 24


def test_all_gather_in_integers():
    """10 sub-tokens to each of 3 others."""
    trips = expected_bytes(sizes(n_heads=2), ALL_GATHER, 5, 4, 4)
    assert trips == (30 * (32 + 18), 30 * 32, 30 * 32, 30 * (32 + 12))
    assert all(isinstance(n, int) for n in trips)


def test_expected_bytes_use_the_expected_rows():
    """40 sub-tokens of width 8 in bfloat16, K = 3, P = 4."""
    row, rows = 16, 40 * t.expected_ranks(3, 4) * 3 / 4
    for way, n, more, back in (
        (PER_RANK, rows, 3 * 6, 3 * 4),
        (PER_SLOT, 40 * 3 * 3 / 4, 2, 0),
        (ALL_GATHER, 40 * 3, 3 * 6, 3 * 4),
    ):
        sent = n * (row + more), n * row, n * row, n * (row + back)
        assert expected_bytes(sizes(), way, 10, 4, 2) == sent


def test_the_all_gather_wins_where_ranks_are_few_beside_k():
    """Sub-tokens alone: P − 1 against c·(P−1)/P, so as soon as c = P."""
    few, many = (
        {
            s: expected_bytes(sizes(top_k=k, width=512), way, 16, P, 2).total
            for s, way in t.SCHEMES.items()
        }
        for k, P in ((16, 2), (2, 16))
    )
    assert few["all_gather"] == pytest.approx(few["all_to_all"], rel=1e-3)
    assert few["all_gather"] < few["all_to_all_per_slot"] / 7
    assert many["all_to_all"] < many["all_gather"] / 5


def test_rings():
    assert t.all_reduce_bytes(100, 4) == 2 * 4 * 100 * 3 // 4
    assert t.scatter_bytes(100, 4) == 4 * 100 * 3 // 4
    assert t.scatter_bytes(10, 3, 2) == pytest.approx(2 * 10 * 2 / 3)
