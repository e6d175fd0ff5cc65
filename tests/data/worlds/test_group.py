import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.worlds.group import Group
from tests.data.worlds.rows import rows


def parity(images):
    return sum(a > b for a, b in itertools.combinations(images, 2)) % 2


@settings(deadline=None, max_examples=12)
@given(
    group=st.sampled_from(["s5", "a5", "s3"]),
    length=st.integers(3, 12),
    bos=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_targets_are_the_products_so_far(group, length, bos, seed):
    world = Group(group, length, bos)
    points = 3 if group == "s3" else 5
    for row in rows(world, "test", 4, seed):
        elements, tokens, targets = row["meta"]["elements"], row["tokens"], row["targets"]
        assert row["meta"]["bos"] == bos and len(tokens) == len(targets) == bos + length
        acc = list(range(points))
        for t, images in enumerate(elements):
            assert sorted(images) == list(range(points))
            assert world.words[tokens[bos + t]] == "".join(map(str, images))
            acc = [acc[i] for i in images]
            assert world.words[targets[bos + t]] == "".join(map(str, acc))
        assert row["answer"] == "".join(map(str, acc))
        if bos:
            assert world.words[tokens[0]] == "<s>" and targets[0] == -1


def test_the_groups():
    s5, a5, s3 = (Group(name) for name in ("s5", "a5", "s3"))
    assert [len(g.elements_GP) for g in (s5, a5, s3)] == [120, 60, 6]
    assert all(parity(images) == 0 for images in a5.elements_GP.tolist())
    for g in (s5, a5, s3):
        elements, n = g.elements_GP, len(g.elements_GP)
        assert elements[0].tolist() == sorted(elements[0])  # the identity
        a, b = np.divmod(np.arange(n * n), n)
        product = np.take_along_axis(elements[a], elements[b], axis=1)
        assert np.array_equal(elements[g.table_GG[a, b]], product)
        assert (np.sort(g.table_GG, axis=0) == np.arange(n)[:, None]).all()


def test_elements_are_uniform():
    world = Group("s3", length=8)
    state = {
        "elements": np.concatenate([r["meta"]["elements"] for r in rows(world, "train", 2000)])
    }
    _, counts = np.unique(state["elements"], axis=0, return_counts=True)
    assert len(counts) == 6 and np.abs(counts / 16_000 * 6 - 1).max() < 0.06


def test_only_its_options(tmp_path):
    from headway.config import UsageError
    from headway.data.worlds.spec import parse_world

    with pytest.raises(UsageError, match="no option 'group'; use length, bos"):
        parse_world("s5,group=a5")
    with pytest.raises(UsageError, match="world:a5 has bos=2; use 0 … 1"):
        parse_world("a5,bos=2")
