"""Draws against a reference of one row in float64; a row's bits do not depend on its neighbours."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import RunError
from headway.serve.params import SamplingParams
from headway.serve.sampling import Row, log_probabilities, sample, uniform

VOCAB = 40


class Only:
    """A grammar's state that allows some tokens."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def mask(self):
        return np.isin(np.arange(VOCAB), self.tokens)

    def accept(self, token):
        pass


def row(seed=0, choice=0, prompt=(), output=(), eos=(VOCAB - 1,), matcher=None, **params):
    return Row(SamplingParams(**params), seed, choice, list(prompt), list(output), eos, matcher)


def reference_logits(x_V, row):
    """Bias, penalties and masks, token by token."""
    p, x = row.params, [float(v) for v in x_V]
    for token, bias in p.logit_bias:
        x[token] += bias
    for token in {*row.prompt, *row.output}:
        times = row.output.count(token)
        x[token] *= 1 / p.repetition_penalty if x[token] > 0 else p.repetition_penalty
        x[token] -= p.frequency_penalty * times + p.presence_penalty * (times > 0)
    allowed = set(p.allowed_token_ids or range(len(x)))
    if row.matcher is not None:
        allowed &= set(row.matcher.tokens)
    if len(row.output) < p.min_tokens:
        allowed = allowed - {*row.eos_ids, *p.stop_token_ids} or allowed
    return [v if token in allowed else -math.inf for token, v in enumerate(x)]


def reference(x_V, row):
    """The candidates in order with their probabilities, plainly, in float64."""
    p, x = row.params, reference_logits(x_V, row)
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if p.temperature == 0:
        return order[:1], [1.0]
    weight = [math.exp((x[i] - x[order[0]]) / p.temperature) for i in order]
    n = p.top_k or len(x)
    order, weight = order[:n], weight[:n]
    total = math.fsum(weight)
    if p.top_p < 1:
        n = sum(math.fsum(weight[:i]) / total < p.top_p for i in range(len(weight)))
        order, weight = order[:n], weight[:n]
    n = sum(w >= p.min_p for w in weight)
    order, weight = order[:n], weight[:n]
    if (p.top_k or len(x)) >= len(x) and p.top_p == 1 and p.min_p == 0:
        order, weight = zip(*sorted(zip(order, weight, strict=True)), strict=True)
    return order, [w / math.fsum(weight) for w in weight]


tokens = st.integers(0, VOCAB - 1)
# Quarters, so that ties are common and sums of them exact.
logits = st.lists(st.integers(-40, 40).map(lambda q: q / 4), min_size=VOCAB, max_size=VOCAB)
rows = st.builds(
    row,
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 5),
    prompt=st.lists(tokens, max_size=6),
    output=st.lists(tokens, max_size=6),
    matcher=st.sampled_from([None, Only(1, 5, 6, 30), Only(VOCAB - 1)]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 5, 20, 39, 100]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.37, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    min_tokens=st.integers(0, 8),
    repetition_penalty=st.sampled_from([1.0, 1.0, 2.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.0, 0.25]),
    logit_bias=st.lists(st.tuples(tokens, st.sampled_from([-100.0, 0.5, 3.0])), max_size=3).map(
        tuple
    ),
    stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
    logprobs=st.sampled_from([-1, 0, 3, 20]),
)


@given(logits, rows)
@settings(max_examples=400, deadline=None)
def test_a_draw_is_the_inverse_cdf_of_the_reference(x_V, one):
    order, weight = reference(x_V, one)
    drawn = sample(torch.tensor([x_V]), [one])[0].token
    assert drawn in order
    if one.params.temperature == 0:
        return
    u = uniform(one.seed, one.choice, len(one.output))
    i = order.index(drawn)
    below = math.fsum(weight[:i])
    # Cuts at p are rounded: where a sum is p to 1e-6 one candidate more or less is right too.
    assert below - 1e-5 <= u <= below + weight[i] + 1e-5 or _near_a_cut(x_V, one)


def _near_a_cut(x_V, one):
    """Whether rounding decides how many candidates there are."""
    p = one.params
    counts = set()
    for factor in (1 - 1e-5, 1 + 1e-5):
        near = {
            "top_p": min(p.top_p * factor, 1.0) if p.top_p < 1 else 1.0,
            "min_p": p.min_p * factor,
        }
        other = Row(
            type(p)(**{**vars(p), **near}),
            one.seed,
            one.choice,
            one.prompt,
            one.output,
            one.eos_ids,
            one.matcher,
        )
        counts.add(len(reference(x_V, other)[0]))
    return len(counts) > 1


@given(st.lists(st.tuples(logits, rows), min_size=1, max_size=6), st.integers(0, 5), st.randoms())
@settings(max_examples=200, deadline=None)
def test_rows_do_not_see_each_other(batch, which, random):
    which %= len(batch)
    x_V, one = batch[which]
    alone = sample(torch.tensor([x_V]), [one])
    order = list(range(len(batch)))
    random.shuffle(order)
    together = sample(torch.tensor([batch[i][0] for i in order]), [batch[i][1] for i in order])
    at = order.index(which)
    assert [together[at]] == alone


@pytest.mark.parametrize("n_vocab", [7, 257, 1000, 8193, 32_768, 70_000])
def test_bits_of_large_rows_are_the_same_alone_and_in_a_batch(n_vocab):
    generator = torch.Generator().manual_seed(n_vocab)
    x_RV = torch.randn(13, n_vocab, generator=generator) * 3
    every = [
        row(
            i,
            eos=(0,),
            logprobs=5,
            temperature=0.5 + i / 7,
            top_k=[0, 5, 300][i % 3],
            top_p=[1.0, 0.8][i % 2],
        )
        for i in range(13)
    ]
    together = sample(x_RV, every)
    for i in range(13):
        assert [together[i]] == sample(x_RV[i : i + 1], every[i : i + 1])


def test_draws_have_the_distribution_of_the_softmax():
    """Chi-square of 20,000 draws at fixed seeds: 99.9% of fair generators stay below the bound."""
    x_V = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0, 1.5, 1.5, -3.0])
    for settings_, bound in (
        ({}, 24.3),
        ({"temperature": 0.7, "top_k": 5}, 18.5),
        ({"top_p": 0.8}, 16.3),
    ):
        one = Row(SamplingParams(**settings_), 0, 0, [], [], (0,))
        order, weight = reference(x_V.tolist(), one)
        p, n = one.params, 20_000
        batch = [Row(p, 11, i % 4, [], [0] * (i // 400), (0,)) for i in range(400)]
        counts = Counter()
        for start in range(0, n, 400):
            for i, r in enumerate(batch):
                r.seed = start + i
            counts.update(t.token for t in sample(x_V.expand(400, 8), batch))
        assert set(counts) <= set(order)
        chi = sum((counts[t] - n * w) ** 2 / (n * w) for t, w in zip(order, weight, strict=True))
        assert chi < bound, (settings_, chi)


def test_numbers_of_neighbouring_keys_are_independent():
    """Seeds, choices and positions in a row: uniform, and no correlation with the next one."""
    for key in (lambda i: (i, 0, 0), lambda i: (5, i, 0), lambda i: (5, 0, i)):
        u = np.array([uniform(*key(i)) for i in range(4000)])
        counts, _ = np.histogram(u, 20, (0, 1))
        assert ((counts - 200) ** 2 / 200).sum() < 43.8  # 99.9% at 19 degrees of freedom
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.052  # 3.3 standard errors
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0) != uniform(1, 0, 0)


def test_generator_is_the_published_philox():
    """Known answer of Philox4x64-10 (Random123's kat_vectors): key 0, counter 0. NumPy counts up
    before its first output, so that counter is -1."""
    bits = np.random.Philox(counter=2**256 - 1, key=0).random_raw()
    assert int(bits) == 0x16554D9ECA36314C


def test_draws_equal_recorded_ones():
    """A seed draws these tokens in every version."""
    x_RV = torch.linspace(-1, 1, VOCAB).expand(6, VOCAB)
    for change, tokens in (
        ({}, [37, 34, 1, 9, 6, 27]),
        ({"top_p": 0.99}, [12, 21, 39, 38, 38, 29]),
    ):
        rows = [row(7, i % 2, output=[0] * i, **change) for i in range(6)]
        assert [t.token for t in sample(x_RV, rows)] == tokens


def test_ties_go_to_the_lowest_id():
    x_V = torch.zeros(1, VOCAB)
    for seed in range(50):
        assert sample(x_V, [row(seed, top_k=3)])[0].token in (0, 1, 2)
        assert sample(x_V, [row(seed, top_k=30)])[0].token < 30
        assert sample(x_V, [row(seed, top_p=0.1)])[0].token < 4
    (greedy,) = sample(x_V, [row(temperature=0.0, logprobs=3)])
    assert greedy.token == 0 and [t for t, _ in greedy.top] == [0, 1, 2]


def test_log_probabilities_are_of_the_raw_logits():
    x_RV = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)) * 4
    want = torch.log_softmax(x_RV.double(), -1)
    drawn = sample(
        x_RV,
        [row(i, temperature=0.3, top_k=2, logit_bias=((3, 50.0),), logprobs=6) for i in range(3)],
    )
    assert [t.token for t in drawn] == [3, 3, 3]
    np.testing.assert_allclose([t.logprob for t in drawn], want[:, 3], atol=1e-6)
    for (_, _, top), want_V in zip(drawn, want, strict=True):
        values, ids = want_V.topk(6)
        assert [t for t, _ in top] == ids.tolist()
        np.testing.assert_allclose([v for _, v in top], values, atol=1e-6)
    assert log_probabilities(x_RV, [3, 3, 3], 6) == drawn


def test_the_logits_of_the_caller_are_not_changed():
    x_RV = torch.randn(2, VOCAB)
    before = x_RV.clone()
    sample(x_RV, [row(logit_bias=((3, 5.0),)), row(matcher=Only(4), min_tokens=3)])
    assert torch.equal(x_RV, before)


def test_penalties_follow_a_growing_reply():
    """The counts are kept up, not made again: they equal those of a fresh row."""
    growing = row(prompt=[1, 2], frequency_penalty=0.5, repetition_penalty=1.5, temperature=0.0)
    x_V = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    for _ in range(12):
        fresh = row(
            prompt=[1, 2],
            output=growing.output,
            frequency_penalty=0.5,
            repetition_penalty=1.5,
            temperature=0.0,
        )
        token = sample(x_V, [growing])[0].token
        assert token == sample(x_V, [fresh])[0].token
        growing.output.append(token)
    assert len(set(growing.output)) > 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_end_the_run(bad):
    x_RV = torch.zeros(2, VOCAB)
    x_RV[1, 4] = bad
    with pytest.raises(RunError, match=str(bad)):
        sample(x_RV, [row(), row()])


def test_extreme_settings_draw_the_most_likely():
    x_V = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 1e4
    best = int(x_V.argmax())
    for change in (
        {"temperature": 1e-5},
        {"temperature": 1e-300},
        {"top_p": 1e-300},
        {"min_p": 1.0},
    ):
        assert sample(x_V, [row(5, **change)])[0].token == best
    flat = Counter(sample(x_V, [row(s, temperature=1e30)])[0].token for s in range(400))
    assert len(flat) == VOCAB


def test_fraction_of_the_unit_interval():
    """52 bits: u·total is below total for every total, so that a draw is always a candidate."""
    u = 1 - Fraction(1, 2**52)
    for total in (1.0, 1.0000000000000002, 3.7, 32768.0):
        assert float(u) * total < total
