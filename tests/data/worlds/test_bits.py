"""Parity and copying."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import UsageError
from headway.data.worlds.copying import Copy
from headway.data.worlds.parity import Parity
from headway.data.worlds.world import generate
from tests.data.worlds.rows import rows


@settings(deadline=None, max_examples=12)
@given(length=st.integers(5, 40), running=st.integers(0, 1), seed=st.integers(0, 99))
def test_parity(length, running, seed):
    for row in rows(Parity(length, running), "test", 4, seed):
        bits = row["prompt"].split()
        assert len(bits) == length and set(bits) <= {"0", "1"}
        assert row["answer"] == str(bits.count("1") % 2)
        assert row["tokens"] == [int(bit) for bit in bits] == row["meta"]["bits"]
        sums = [sum(row["tokens"][: t + 1]) % 2 for t in range(length)]
        assert row["targets"] == (sums if running else [-1] * (length - 1) + sums[-1:])


@settings(deadline=None, max_examples=12)
@given(length=st.integers(5, 40), seed=st.integers(0, 99))
def test_copy(length, seed):
    world = Copy(length)
    for row in rows(world, "val", 4, seed):
        *bits, bar = row["prompt"].split()
        assert bar == "|" and len(bits) == length and row["answer"].split() == bits
        whole = [*bits, "|", *bits]
        assert [world.words[i] for i in row["tokens"]] == whole[:-1]
        assert len(row["tokens"]) == world.n_tokens
        asked = [(t, i) for t, i in enumerate(row["targets"]) if i >= 0]
        assert [t for t, _ in asked] == list(range(length, 2 * length))
        assert all(world.words[i] == whole[t + 1] for t, i in asked)


def test_a_length_with_too_few_items_is_refused():
    with pytest.raises(UsageError, match="no items for the .* split at this size.* larger length"):
        for split in ("train", "val", "test"):
            generate(Parity(1), split, np.arange(3, dtype=np.uint64))
    for world in (Parity(0), Copy(0)):
        with pytest.raises(UsageError, match="length=0; use 1 or more"):
            world.check()
    with pytest.raises(UsageError, match="running=2; use 0 … 1"):
        Parity(4, 2).check()
