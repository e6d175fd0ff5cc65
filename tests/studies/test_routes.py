"""Counts of the studies that read recorded routes are those by hand."""

import numpy as np
import pytest

from studies import batch_one_balance, experts_touched


def test_distinct_experts_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    index = np.stack([rng.permutation(6)[:2] for _ in range(8 * 5 * 3 * 2)]).reshape(8, 5, 3, 2, 2)
    for batch in (1, 2, 8):
        counts = []
        for group in range(8 // batch):
            rows = range(group * batch, (group + 1) * batch)
            for s in range(5):
                chosen = {
                    (layer, h, int(e))
                    for n in rows
                    for layer in range(3)
                    for h in range(2)
                    for e in index[n, s, layer, h]
                }
                counts.append(len(chosen))
        assert experts_touched.distinct(index, 6, batch) == pytest.approx(np.mean(counts))
    one = experts_touched.independent(index, 6, 1)
    assert one == pytest.approx(3 * 2 * 2)  # one token touches K experts per head and layer


def test_the_busiest_rank_is_that_by_hand():
    index = np.array([[[[0, 1], [2, 3]]], [[[0, 3], [1, 2]]]])  # 2 tokens, 1 layer, 2 heads, K 2
    assert batch_one_balance.busiest(index, 4, 2, "hp") == 1
    # ep=2: experts 0, 1 on rank 0. Token 0 reads 2 and 2; token 1 reads 2 and 2
    assert batch_one_balance.busiest(index, 4, 2, "ep") == 1
    skewed = np.array([[[[0, 1], [1, 0]]]])
    assert batch_one_balance.busiest(skewed, 4, 2, "ep") == 2
