import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.topk import top_k, top_k_in_groups, top_k_reference

VALUES = [-3.0, -1.0, -0.0, 0.0, 0.5, 2.0, float("inf"), float("-inf"), float("nan")]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 20), st.data())
def test_equals_a_stable_sort_with_ties_nan_and_inf(n_experts, data):
    rows = data.draw(
        st.lists(
            st.lists(st.sampled_from(VALUES), min_size=n_experts, max_size=n_experts),
            min_size=1,
            max_size=5,
        )
    )
    k = data.draw(st.integers(1, n_experts))
    scores = torch.tensor(rows)
    assert torch.equal(top_k(scores, k), top_k_reference(scores, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_scores(dtype):
    scores = torch.randn(50, 3, 17, dtype=dtype)
    for k in (1, 2, 3, 6, 8, 9, 17):
        assert torch.equal(top_k(scores, k), scores.topk(k).indices)


def test_ties_go_to_the_lowest_index():
    assert top_k(torch.zeros(1, 1, 6), 3).tolist() == [[[0, 1, 2]]]


def test_does_not_change_the_scores():
    scores = torch.randn(4, 1, 5)
    before = scores.clone()
    top_k(scores, 2)
    assert torch.equal(scores, before)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_in_groups(n_groups, size, data):
    values = st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0])
    scores = data.draw(st.lists(values, min_size=n_groups * size, max_size=n_groups * size))
    chosen = data.draw(st.integers(1, n_groups))
    best = data.draw(st.integers(1, size))
    k = data.draw(st.integers(1, chosen * size))
    goodness = [sum(sorted(scores[g * size : (g + 1) * size])[-best:]) for g in range(n_groups)]
    groups = sorted(range(n_groups), key=lambda g: (-goodness[g], g))[:chosen]
    inside = [e for e in range(n_groups * size) if e // size in groups]
    want = sorted(inside, key=lambda e: (-scores[e], e))[:k]
    got = top_k_in_groups(torch.tensor([[scores]]), k, n_groups, chosen, best)
    assert got.tolist() == [[want]]
