"""Kept tokens and their probabilities; generation against whole forward passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import ModelConfig, MoEConfig, UsageError
from headway.data.tokenizer import load_tokenizer
from headway.eval.sampling import generate, probabilities
from headway.model.transformer import Transformer

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def test_temperature_top_k_top_p():
    torch.testing.assert_close(probabilities(LOGITS, 1.0, 0, 1.0), LOGITS.exp())
    assert probabilities(LOGITS, 0.0, 0, 1.0).tolist() == [1, 0, 0, 0]
    squared = LOGITS.exp() ** 2
    torch.testing.assert_close(probabilities(LOGITS, 0.5, 0, 1.0), squared / squared.sum())
    torch.testing.assert_close(
        probabilities(LOGITS, 1.0, 2, 1.0), torch.tensor([0.625, 0.375, 0, 0])
    )
    for top_p, candidates in ((0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (1e-9, 1)):
        assert int((probabilities(LOGITS, 1.0, 0, top_p) > 0).sum()) == candidates, top_p
    both = probabilities(LOGITS, 1.0, 3, 0.6)  # of the three kept: 0.526, 0.316, 0.158
    torch.testing.assert_close(both, torch.tensor([0.625, 0.375, 0, 0]))
    ties = probabilities(torch.zeros(5), 1.0, 2, 1.0)
    assert ties.tolist() == [0.5, 0.5, 0, 0, 0]


@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=20), st.integers(0, 25), st.floats(0.01, 1)
)
@settings(max_examples=100, deadline=None)
def test_probabilities_sum_to_one_and_keep_the_likeliest(logits, top_k, top_p):
    p = probabilities(torch.tensor(logits), 1.0, top_k, top_p)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
    drawn, dropped = torch.tensor(logits)[p > 0], torch.tensor(logits)[p == 0]
    assert len(drawn) >= 1 and (top_k == 0 or len(drawn) <= top_k)
    if len(dropped):
        assert (
            drawn.min() >= dropped.max()
            or float(torch.softmax(torch.tensor(logits), 0).min()) < 1e-6
        )


@pytest.mark.parametrize(
    "arguments, words",
    [((-1.0, 0, 1.0), "temperature"), ((1.0, -1, 1.0), "top_k"), ((1.0, 0, 0.0), "top_p")],
)
def test_settings_that_leave_nothing_are_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        probabilities(LOGITS, *arguments)


@pytest.fixture(scope="module")
def model():
    moe = MoEConfig(n_heads=2, n_experts=4, top_k=2, d_expert=8)
    config = ModelConfig(vocab_size=320, n_layers=2, d_model=32, n_heads=2, init_std=1.0, moe=moe)
    model = Transformer(config, seed=0)
    with torch.no_grad():
        model.head.weight *= 40  # decided predictions, so that argmax is not a matter of rounding
    return model


def test_greedy_text_equals_whole_forward_passes(model):
    tokenizer = load_tokenizer("bytes")
    text = generate(model, tokenizer, "def f(", 24, temperature=0.0)
    ids = [int(i) for i in tokenizer.encode("def f(")]
    start = len(ids)
    for _ in range(24):
        token = int(model(torch.tensor([ids])).logits_BSV[0, -1, :257].argmax())
        if token == tokenizer.eos:
            break
        ids.append(token)
    assert text == tokenizer.decode(ids[start:])
    assert model.training


def test_seed_decides_and_the_global_generator_is_untouched(model):
    tokenizer = load_tokenizer("bytes")
    before = torch.get_rng_state()
    one = generate(model, tokenizer, "x", 30, temperature=5.0, seed=1)
    assert one == generate(model, tokenizer, "x", 30, temperature=5.0, seed=1)
    assert one != generate(model, tokenizer, "x", 30, temperature=5.0, seed=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("prompt", ["", "é"])
def test_pieces_join_to_the_text(model, prompt):
    tokenizer = load_tokenizer("bytes")
    pieces = []
    text = generate(model, tokenizer, prompt, 40, temperature=9.0, seed=3, on_token=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 1


def test_long_texts_take_linear_time(model, monkeypatch):
    """The whole text is decoded once, not once per token."""
    tokenizer, decoded = load_tokenizer("bytes"), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    generate(model, tokenizer, "x", 60, temperature=0.0, on_token=lambda _: None)
    assert len(decoded) == 1 and decoded[0] <= 60


def test_padded_ids_are_never_drawn(model):
    class Ids:
        vocab_size, eos = 3, 2

        def encode(self, text):
            return [0]

        def decode(self, ids):
            return "".join("ab"[i] for i in ids)  # an id beyond the two would fail

        def decode_stream(self):
            return None

    assert set(generate(model, Ids(), "a", 20, temperature=9.0)) <= {"a", "b"}
