"""The tables of `headway`, read in both directions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import ModelConfig, RouterConfig, UsageError
from headway.hub.families import headway
from tests.hub.small_runs import MODELS, SMALL, random_model


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_goes_there_and_back(name):
    stored = random_model(MODELS[name]).state_dict()
    rows = [row for row in headway.rows(MODELS[name]) if row.ours in stored]
    tied = {"head.weight"} if MODELS[name].tied else set()
    assert {row.ours for row in rows} == set(stored) - tied
    assert len({row.theirs for row in rows}) == len(rows)
    for row in rows:
        w = stored[row.ours]
        assert torch.equal(row.to_ours(row.to_theirs(w), tuple(w.shape)), w)


def test_experts_lie_in_one_stack():
    """Expert e of head h is number h·E + e, its gate before its up projection, as `Linear` has it."""
    config = MODELS["multi_head"]
    stored = random_model(config).state_dict()
    rows = {row.ours: row for row in headway.rows(config)}
    w_in, w_out = (f"layers.1.ffn.experts.{name}" for name in ("w_in_HEGFL", "w_out_HEFL"))
    gate_up, down = (rows[name].to_theirs(stored[name]) for name in (w_in, w_out))
    assert gate_up.shape == (12, 32, 16) and down.shape == (12, 16, 16)
    gate, up = stored[w_in][1, 2]
    assert torch.equal(gate_up[8], torch.cat((gate, up)))
    assert torch.equal(down[8], stored[w_out][1, 2].T)


def test_a_transposed_expert_does_not_come_back():
    """The check of a round trip fails where one expert is wrong, which has the same shape here."""
    config = MODELS["multi_head"]
    stored = random_model(config).state_dict()
    row = next(row for row in headway.rows(config) if row.ours == "layers.0.ffn.experts.w_out_HEFL")
    there = row.to_theirs(stored[row.ours]).clone()
    there[5] = there[5].T.clone()
    assert not torch.equal(row.to_ours(there, stored[row.ours].shape), stored[row.ours])


@pytest.mark.parametrize("name", MODELS)
def test_a_config_means_the_same_model(name):
    """Derived sizes come back resolved; the modules and their tensors are the same."""
    config = headway.to_config(MODELS[name])
    back = headway.to_model(config)
    assert headway.to_config(back) == config and back.check() is not None
    theirs, ours = random_model(back).state_dict(), random_model(MODELS[name]).state_dict()
    assert {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in ours.items()}


@settings(max_examples=50, deadline=None)
@given(
    d_head=st.integers(1, 8).map(lambda n: 2 * n),
    kv=st.sampled_from([0, 1, 2, 4]),
    window=st.lists(st.integers(0, 9), max_size=3),
    dense=st.sets(st.integers(0, 2)),
    step=st.integers(1, 3),
    reads=st.sampled_from(["auto", "token", "sub_token"]),
    scale=st.floats(0.1, 9),
)
def test_configs_of_any_values_come_back(d_head, kv, window, dense, step, reads, scale):
    moe = replace(
        MODELS["multi_head"].moe,
        dense_layers=tuple(dense),
        sparse_step=step,
        router=RouterConfig(reads=reads, scale=scale),
    )
    model = replace(SMALL, n_layers=3, d_head=d_head, n_kv_heads=kv, window=tuple(window), moe=moe)
    back = headway.to_model(headway.to_config(model))
    assert [back.is_sparse(i) for i in range(3)] == [model.is_sparse(i) for i in range(3)]
    assert [back.window_of(i) for i in range(3)] == [model.window_of(i) for i in range(3)]
    assert back.kv_heads == model.kv_heads and back.head_width == d_head
    assert back.moe.router.scale == scale and back.moe.reads_token == moe.reads_token


def test_a_field_without_a_key_is_named():
    config = replace(SMALL, rope=replace(SMALL.rope, rotary_dim=4))
    with pytest.raises(
        UsageError, match=r"model\.rope\.rotary_dim=4 has no key in a headway folder"
    ):
        headway.to_config(config)
    assert headway.to_config(ModelConfig(vocab_size=8, max_len=99))["vocab_size"] == 8
