"""Scores of diversity against their definitions."""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from headway.config import ModelConfig, MoEConfig
from headway.eval import diversity
from headway.eval.diversity import gradients, hashed_words, mean_cosine, unit, vendi, with_interval
from headway.model.transformer import Transformer


def gaussian(n, d, seed=0):
    return unit(np.random.default_rng(seed).standard_normal((n, d)))


@given(st.integers(2, 12), st.integers(2, 12), st.sampled_from([0.5, 1.0, 2.0, math.inf]))
def test_it_is_the_entropy_of_the_kernel(n, d, order):
    """Both ways round, against the eigenvalues of K/n; and between 1 and n."""
    x = gaussian(n, d, seed=n * 13 + d)
    value = np.linalg.eigvalsh(x @ x.T / n)
    value = value[value > 1e-12]
    if order == 1:
        expected = math.exp(-(value * np.log(value)).sum())
    elif math.isinf(order):
        expected = 1 / value.max()
    else:
        expected = (value**order).sum() ** (1 / (1 - order))
    assert vendi(x, order) == pytest.approx(expected, rel=1e-9)
    assert 1 - 1e-9 <= vendi(x, order) <= n + 1e-9


def test_known_scores():
    x = gaussian(500, 64)
    assert vendi(x) == pytest.approx(60.0, abs=0.2)
    assert vendi(np.tile(x[:50], (10, 1))) == pytest.approx(vendi(x[:50]))  # copies add nothing
    assert vendi(np.tile(x[:1], (9, 1))) == pytest.approx(1) and vendi(np.eye(7)) == pytest.approx(
        7
    )
    offset = np.random.default_rng(0).standard_normal((500, 64)) + 6
    assert vendi(unit(offset)) < 1.4 and mean_cosine(offset) > 0.95
    assert abs(mean_cosine(offset, offset.mean(0))) < 0.01


def test_the_mean_cosine_is_that_of_all_pairs():
    x = gaussian(20, 5)
    pairs = [x[i] @ x[j] for i in range(20) for j in range(20) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean(pairs))


def test_ten_thousand_by_256_take_less_than_five_seconds():
    x, begin = gaussian(10_000, 256), time.process_time()
    assert 250 < vendi(x) < 256
    assert time.process_time() - begin < 5


def test_intervals_hold_the_scores_of_other_sets_as_large():
    """A mixture of directions with unequal shares: 95% intervals hold the mean over many sets."""

    def drawn(seed, n=200):
        rng = np.random.default_rng(seed)
        return unit(np.eye(40)[rng.choice(40, n, p=share)] + 0.3 * rng.standard_normal((n, 40)))  # fmt: skip

    share = np.arange(1, 41) / np.arange(1, 41).sum()
    sets = [drawn(seed) for seed in range(60)]
    mean = np.mean([vendi(x) for x in sets])
    held = [
        low <= mean <= high for low, high in (with_interval(x, vendi, draws=40).ci95 for x in sets)
    ]
    assert 0.85 <= np.mean(held) <= 1.0
    sd = np.std([vendi(x) for x in sets])
    low, high = with_interval(sets[0], vendi).ci95
    assert 0.6 < (high - low) / (2 * 1.96 * sd) < 1.6


def test_few_documents_have_no_interval():
    """Halves of two or three documents are single ones, all of which score 1."""
    for n in (2, 3):
        assert with_interval(gaussian(n, 8), vendi) == (vendi(gaussian(n, 8)), None)
    value, ci95 = with_interval(gaussian(4, 8), vendi)
    assert ci95 is not None and ci95[0] < value < ci95[1]


def test_words_tell_templates_from_varied_texts():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(500)]
    varied = [" ".join(rng.choice(words, 30)) for _ in range(60)]
    template = [f"the {rng.choice(words)} gives it to the {rng.choice(words)} ." for _ in range(60)]
    scores = [vendi(hashed_words(texts)) for texts in (varied, template, varied[:1] * 60)]
    assert scores[0] > 3 * scores[1] > 3 and scores[2] == pytest.approx(1)
    x = hashed_words(["", "one two", "two one"])
    assert not x[0].any() and np.linalg.norm(x[1]) == pytest.approx(1)
    assert 0.3 < x[1] @ x[2] < 0.9  # same words, other pairs
    x = hashed_words(["one", "one one one one"])
    assert x[0] @ x[1] == pytest.approx(2 / (4 + 3) ** 0.5)  # 4 words as 2, 3 pairs as √3


@pytest.fixture(scope="module")
def model():
    moe = MoEConfig(n_experts=4, top_k=2, d_expert=8, n_heads=2)
    model = Transformer(
        ModelConfig(n_layers=2, d_model=16, n_heads=2, vocab_size=32, moe=moe), seed=0
    )
    return model.eval()


@pytest.mark.parametrize(
    ("chunk", "held"),
    [(diversity.CHUNK, diversity.GRADIENTS), (100, diversity.GRADIENTS), (100, 1)],
)
def test_gradients_are_those_of_the_last_block(model, chunk, held, monkeypatch):
    monkeypatch.setattr(diversity, "CHUNK", chunk)
    monkeypatch.setattr(diversity, "GRADIENTS", held)  # 1: one document at a time
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 32, 12).tolist() for _ in range(12)]
    g = gradients(model, ids, dim=4096)
    exact = []
    for part in ids:
        model.zero_grad()
        tokens = torch.tensor([part])
        model(tokens[:, :-1], tokens[:, 1:]).nats.backward()
        grads = [
            p.grad if p.grad is not None else torch.zeros_like(p)
            for p in model.blocks()[-1].parameters()
        ]
        exact.append(F.normalize(torch.cat([grad.flatten() for grad in grads]), dim=0).numpy())
    exact = np.stack(exact)
    np.testing.assert_allclose(g @ g.T, exact @ exact.T, atol=5 / 4096**0.5)
    assert vendi(g) == pytest.approx(vendi(exact.astype(np.float64)), rel=0.05)


def test_copies_teach_one_thing(model):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 32, 12).tolist() for _ in range(30)]
    assert vendi(gradients(model, ids[:1] * 30)) == pytest.approx(1, abs=1e-4)
    assert vendi(gradients(model, ids)) > 5


def test_near_copies_are_counted_by_the_document():
    pytest.importorskip("datasketch", reason="the extra [data]")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([f"w{i}" for i in range(400)], 40)) for _ in range(8)]
    assert diversity.near_duplicate_rate(texts) == 0
    copies = [*texts, texts[0], texts[1] + " and"]  # two pairs of ten
    assert diversity.near_duplicate_rate(copies) == pytest.approx(0.4)
