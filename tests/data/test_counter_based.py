import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.counter_based import mix, permute


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(n, key):
    image = permute(np.arange(n, dtype=np.uint64), n, np.full(n, key, dtype=np.uint64))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permutations_differ_by_key_and_spread():
    n = 4096
    images = [permute(np.arange(n, dtype=np.uint64), n, np.full(n, k, np.uint64)) for k in (0, 1)]
    assert (images[0] == images[1]).mean() < 0.01
    for image in images:
        # Neighbours land far apart: a uniform pair is n/3 apart on average.
        distance = np.abs(np.diff(image.astype(np.int64))).mean()
        assert abs(distance / (n / 3) - 1) < 0.05
        assert abs(np.corrcoef(np.arange(n), image.astype(float))[0, 1]) < 0.06


def test_every_arrangement_of_a_small_set_occurs_about_equally_often():
    keys = mix(np.arange(24_000, dtype=np.uint64))
    images = np.stack([permute(np.full(len(keys), i, np.uint64), 3, keys) for i in range(3)], 1)
    _, counts = np.unique(images, axis=0, return_counts=True)
    assert len(counts) == 6 and np.abs(counts / 4000 - 1).max() < 0.1


def test_permutation_takes_a_key_per_row():
    index, keys = np.array([3, 3, 9, 0], np.uint64), np.array([1, 2, 1, 2], np.uint64)
    together = permute(index, 1000, keys)
    alone = [permute(index[i : i + 1], 1000, keys[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone
