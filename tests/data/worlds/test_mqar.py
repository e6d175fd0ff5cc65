import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import UsageError
from headway.data.worlds.lines import lines
from headway.data.worlds.mqar import Mqar
from headway.data.worlds.world import generate
from tests.data.worlds.rows import rows


@st.composite
def sizes(draw):
    pairs = draw(st.integers(1, 6))
    length = 2 * draw(st.integers(2 * pairs, 2 * pairs + 12))
    return Mqar(pairs, length, length + 2 * draw(st.integers(1, 20)))


@settings(deadline=None, max_examples=15)
@given(world=sizes(), seed=st.integers(0, 2**40))
def test_each_query_asks_for_the_value_beside_its_key(world, seed):
    n, T = world.pairs, world.length
    for row in rows(world, "train", 5, seed):
        tokens, targets = row["tokens"], row["targets"]
        assert row["meta"] == {"pairs": n} and len(tokens) == len(targets) == T
        value_of = dict(zip(tokens[: 2 * n : 2], tokens[1 : 2 * n : 2], strict=True))
        assert len(value_of) == len(set(value_of.values())) == n
        asked = [t for t in range(T) if targets[t] >= 0]
        assert sorted(tokens[t] for t in asked) == sorted(value_of)
        assert all(targets[t] == value_of[tokens[t]] for t in asked)
        assert all(t >= 2 * n and t % 2 == 0 for t in asked)
        assert all(tokens[t] == 0 for t in range(2 * n, T) if t not in asked)
        assert row["prompt"].split() == [world.words[i] for i in tokens]
        assert row["answer"].split() == [world.words[targets[t]] for t in asked]
        assert all(word[0] == "v" for word in row["answer"].split())


def test_gaps_follow_the_power_law():
    world = Mqar(pairs=1, length=12)
    state = generate(world, "train", np.arange(40_000, dtype=np.uint64))
    seen = np.bincount(state["gaps"][:, 0], minlength=5) / 40_000
    wanted = np.arange(1, 6) ** (0.01 - 1)
    assert np.abs(seen - wanted / wanted.sum()).max() < 0.01
    # without replacement: the second of two draws is by the law over what is left
    gaps = generate(Mqar(pairs=2, length=12), "train", np.arange(40_000, dtype=np.uint64))["gaps"]
    second = np.bincount(gaps[gaps[:, 0] == 0, 1], minlength=4)
    left = np.arange(2, 5) ** (0.01 - 1)
    assert second[0] == 0
    assert np.abs(second[1:] / second.sum() - left / left.sum()).max() < 0.02


def test_keys_and_values_are_uniform():
    world = Mqar(pairs=3, length=12, vocab=18)
    state = generate(world, "train", np.arange(20_000, dtype=np.uint64))
    for name, least, n in (("keys", 1, 8), ("values", 9, 9)):
        share = np.bincount(state[name].ravel() - least, minlength=n) / 60_000
        assert len(share) == n and np.abs(share * n - 1).max() < 0.05


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (Mqar(pairs=8, length=10), "pairs=8 needs an even length of at least 32, and length is 10"),
        (Mqar(pairs=2, length=9), "length is 9; use length 10"),
        (Mqar(pairs=2, length=16, vocab=16), "vocab is 16; use vocab=18"),
        (Mqar(pairs=0), "pairs=0; use 1 or more"),
    ],
)
def test_lengths_that_do_not_fit(world, words):
    with pytest.raises(UsageError, match=words):
        world.check()


def test_lines_are_fixed():
    """Items are part of what a benchmark promises: a change here makes another one."""
    first = next(lines(Mqar(pairs=2, length=12, vocab=16), "test", 1, seed=9))
    assert json.loads(first) == {
        "prompt": "k3 v5 k4 v0 - - - - k3 - k4 -",
        "answer": "v5 v0",
        "tokens": [3, 13, 4, 8, 0, 0, 0, 0, 3, 0, 4, 0],
        "targets": [-1, -1, -1, -1, -1, -1, -1, -1, 13, -1, 8, -1],
        "meta": {"pairs": 2},
    }
