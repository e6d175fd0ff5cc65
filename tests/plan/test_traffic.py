"""Bytes on the network: against hand calculation and against a simulated choice of experts."""

from dataclasses import replace

import numpy as np
import pytest

from headway.config import ModelConfig, MoEConfig, RouterConfig
from headway.plan.traffic import traffic

MODEL = ModelConfig(
    vocab_size=64, n_layers=2, d_model=256, moe=MoEConfig(n_heads=8, n_experts=64, top_k=4)
)


def items(model, **options):
    return {i.name: i.value for i in traffic(model, **options)}


def test_by_hand():
    found = items(MODEL, n_ranks=8)
    assert found["Head Parallel"] == 4 * 256 * 2 * 7 / 8
    assert found["Expert Parallel"] == 4 * found["Head Parallel"]
    # research: P = 8, k = 4 → 3.31 ranks
    assert found["Expert Parallel, one copy per rank"] / found["Head Parallel"] == pytest.approx(
        3.31, abs=0.005
    )
    assert items(MODEL, n_ranks=8, training=False)["Head Parallel"] == found["Head Parallel"] / 2


def test_head_parallel_does_not_grow_with_k():
    more = replace(MODEL, moe=replace(MODEL.moe, top_k=16))
    assert items(more, n_ranks=4)["Head Parallel"] == items(MODEL, n_ranks=4)["Head Parallel"]
    assert (
        items(more, n_ranks=4)["Expert Parallel"] == 4 * items(MODEL, n_ranks=4)["Expert Parallel"]
    )


def test_router_on_the_whole_token_sends_indices_and_gates():
    token = replace(MODEL, moe=replace(MODEL.moe, router=RouterConfig(reads="token")))
    extra = items(token, n_ranks=8)["Head Parallel"] - items(MODEL, n_ranks=8)["Head Parallel"]
    assert extra == 12 * 8 * 4 * 7 / 8


def test_expected_copies_by_simulation():
    """Distinct ranks among K independent choices of P ranks."""
    P, K = 8, 4
    ranks = np.random.default_rng(0).integers(0, P, (100_000, K))
    ranks.sort(axis=1)
    distinct = 1 + (np.diff(ranks, axis=1) > 0).sum(1)
    found = items(MODEL, n_ranks=P)
    assert found["Expert Parallel, one copy per rank"] == pytest.approx(
        4 * 256 * 2 * 7 / 8 * distinct.mean(), rel=0.01
    )


def test_latent_and_flat_and_dense():
    flat = replace(MODEL, moe=MoEConfig(kind="moe", n_experts=64, top_k=4))
    latent = replace(MODEL, moe=MoEConfig(kind="latent", n_experts=64, top_k=4, d_latent=64))
    assert (
        items(flat, n_ranks=8)["Expert Parallel"] == 4 * items(latent, n_ranks=8)["Expert Parallel"]
    )
    assert "Head Parallel" not in items(flat, n_ranks=8)
    assert traffic(replace(MODEL, moe=MoEConfig(kind="dense")), 8) == ()
