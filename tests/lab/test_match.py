"""Arms get the cost of their baseline by their free fields, to 1%; what cannot be reached is said."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway import recipes
from headway.config import Config, MoEConfig, UsageError, leaves, with_leaf
from headway.lab.match import TOLERANCE, Place, bytes_per_token, match, measure, quantities
from headway.model.linear import FeedForward
from headway.model.transformer import Transformer
from headway.plan.describe import describe, with_vocab

ARMS = {
    name: with_vocab(recipes.load(name)) for name in ("dense", "moe", "latent", "multi_head_latent")
}
FLAT = ARMS["moe"]


def test_what_is_measured_is_what_describe_and_the_model_say():
    costs, model = describe(FLAT), Transformer(FLAT.model, seed=0)
    assert measure(FLAT, "active-flops") == costs["flops_per_token_training"]
    assert measure(FLAT, "active-parameters") == costs["active_parameters"]
    assert measure(FLAT, "total-parameters") == sum(p.numel() for p in model.parameters())
    assert measure(FLAT, "memory") == costs["state_bytes"] + costs["activation_bytes"]
    sent = costs["traffic_bytes_per_token_and_layer"]["Expert Parallel, one copy per rank"]
    assert measure(FLAT, "traffic") == pytest.approx(4 * sent, abs=4)
    heads = describe(ARMS["multi_head_latent"])["traffic_bytes_per_token_and_layer"]
    assert bytes_per_token(ARMS["multi_head_latent"], 8) == pytest.approx(
        4 * heads["Head Parallel"], abs=4
    )
    assert bytes_per_token(ARMS["dense"], 8) == 0
    assert 0 < measure(FLAT, "step-time") < 1


@pytest.mark.parametrize("name", ["dense", "latent", "multi_head_latent"])
def test_equal_executed_flops(name):
    want = measure(FLAT, "active-flops")
    matched = match(ARMS[name], {"active-flops": want})
    field = "model.d_ff" if name == "dense" else "model.moe.d_expert"
    assert list(matched.solved) == [field] and matched.worst <= TOLERANCE
    assert measure(matched.config, "active-flops") == matched.values["active-flops"]
    # nearer than its neighbours
    for step in (-1, 1):
        other = with_leaf(matched.config, field, matched.solved[field] + step)
        assert abs(measure(other, "active-flops") / want - 1) >= matched.worst


@pytest.mark.parametrize("name", ["latent", "multi_head_latent"])
def test_two_budgets_at_once(name):
    targets = {q: measure(FLAT, q) for q in ("active-flops", "total-parameters")}
    matched = match(ARMS[name], targets)
    assert set(matched.solved) == {"model.moe.d_expert", "model.moe.n_experts"}
    assert max(abs(v) for v in matched.mismatch.values()) == matched.worst <= TOLERANCE
    kept = {"model.moe.d_expert", "model.moe.n_experts"}
    before, after = leaves(ARMS[name].to_dict()), leaves(matched.config.to_dict())
    assert {k for k in before if before[k] != after[k]} <= kept


@given(
    st.sampled_from([64, 128, 192]),
    st.sampled_from([1, 2, 4]),
    st.integers(2, 6),
    st.integers(1, 4),
)
@settings(max_examples=15, deadline=None)
def test_any_shape_is_matched_or_named(d_model, heads, top_k, layers):
    model = replace(FLAT.model, d_model=d_model, n_layers=layers)
    base = replace(FLAT, model=model)
    arm = replace(
        base, model=replace(model, moe=MoEConfig(n_heads=heads, top_k=top_k, n_experts=4 * top_k))
    )
    try:
        matched = match(arm, {"active-flops": measure(base, "active-flops")})
    except UsageError as error:
        assert "the nearest is" in str(error)
    else:
        assert (
            abs(measure(matched.config, "active-flops") / measure(base, "active-flops") - 1)
            <= TOLERANCE
        )


def narrow_first(model):
    model.layers[0].ffn = FeedForward(128, 64, "swiglu")


def test_an_edited_model_is_matched_by_what_it_costs():
    want = measure(FLAT, "active-flops")
    assert measure(FLAT, "active-flops", narrow_first) < want
    wider = match(FLAT, {"active-flops": want}, edit=narrow_first).config
    assert wider.model.moe.d_expert > FLAT.model.moe.d_expert
    assert measure(wider, "active-flops", narrow_first) == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "targets", "free", "words"),
    [
        (
            "dense",
            {"active-flops": 1.0, "total-parameters": 1.0},
            (),
            "2 budgets .* and 1 free field",
        ),
        ("moe", {"traffic": 1e9}, (), "is not reached within 1%; the nearest is .*; free top_k"),
        ("dense", {"active-flops": 1.0}, (), "the nearest is .* \\(d_ff 1\\)"),
        ("moe", {"active-flops": 1.0}, ("kind",), "--free kind is no integer field"),
        ("moe", {"active-flops": 1.0}, ("nope",), "--free nope is no integer field"),
    ],
)
def test_what_cannot_be_matched_is_one_line(name, targets, free, words):
    with pytest.raises(UsageError, match=words):
        match(ARMS[name], targets, free)


def test_what_is_equal_already_stays():
    narrow = with_leaf(FLAT, "model.moe.d_expert", 32)
    assert match(narrow, {"traffic": measure(FLAT, "traffic")}).config == narrow


def test_names_of_quantities():
    assert quantities("active-flops,total-parameters") == ("active-flops", "total-parameters")
    for text in ("", "flops", "active-flops,active-flops", "active-flops,memory,traffic"):
        with pytest.raises(UsageError, match="--match"):
            quantities(text)
    with pytest.raises(UsageError, match="step-time, cpu-time"):
        quantities("bogus")


def test_traffic_is_between_ranks():
    with pytest.raises(UsageError, match="--ranks 0 is below 1"):
        Place(ranks=0)


def test_a_leaf_is_replaced_by_its_path():
    config = with_leaf(Config(), "model.moe.router.reads", "token")
    assert config.model.moe.router.reads == "token"
    with pytest.raises(UsageError, match="no field 'nope'"):
        with_leaf(Config(), "model.nope", 1)
