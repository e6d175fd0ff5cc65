"""Copied targets: those that a search through the window by hand predicts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.eval.copying import CONTEXT, copied, repeated


def by_hand(tokens: list[int], targets: list[int]) -> list[bool]:
    answers = []
    for t, target in enumerate(targets):
        context, answer = tokens[t - CONTEXT + 1 : t + 1], False
        for j in range(t - 1, CONTEXT - 2, -1) if t >= CONTEXT - 1 else ():
            if tokens[j - CONTEXT + 1 : j + 1] == context:
                answer = tokens[j + 1] == target
                break
        answers.append(answer)
    return answers


@given(st.lists(st.lists(st.integers(0, 2), min_size=30, max_size=30), min_size=1, max_size=3))
@settings(max_examples=80, deadline=None)
def test_the_last_earlier_occurrence_decides(rows):
    ids_BS = torch.tensor(rows)
    tokens_BS, targets_BS = ids_BS[:, :-1], ids_BS[:, 1:].clone()
    targets_BS[:, 20] = -1  # is ignored, and never copied
    found = copied(tokens_BS, targets_BS)
    expected = [by_hand(a.tolist(), b.tolist()) for a, b in zip(tokens_BS, targets_BS, strict=True)]
    assert found.tolist() == expected and not found[:, 20].any()


def test_a_window_shorter_than_the_context_gives_nothing_away():
    ids = torch.zeros(2, CONTEXT, dtype=torch.int64)
    assert not copied(ids, ids).any()
    text = torch.tensor([list(b"foo(x) + foo(x)")])
    assert copied(text[:, :-1], text[:, 1:])[0].nonzero().flatten().tolist() == [12, 13]


def test_a_text_that_goes_round_in_circles_repeats_itself():
    assert repeated([1, 2, 3, 4, 5, 6, 7, 8]) == 0 and repeated([]) == 0
    circle = [1, 2, 3, 4, 5] * 4
    assert repeated(circle) == (20 - 9) / 20  # from the ninth token on, the four before were seen
    assert repeated([*circle[:9], 0]) == 0
