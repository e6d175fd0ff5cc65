import numpy as np
import pytest

from headway.data.worlds.world import Items
from headway.eval.floors import floors


def items(rows):
    """Items from (tokens, targets)."""
    tokens, targets = (np.array(x) for x in zip(*rows, strict=True))
    return Items(tokens, targets, np.full(len(rows), tokens.shape[1]), targets[:, -1:])


def test_floors_by_hand():
    # words: 0 and 1 are asked for, 2 and 3 are not
    train = items([([2, 0, 2], [-1, -1, 0]), ([2, 2, 1], [-1, -1, 0]), ([3, 3, 3], [-1, -1, 1])])
    test = items([([3, 0, 2], [-1, -1, 0]), ([0, 1, 3], [-1, -1, 1]), ([3, 3, -1], [-1, 1, -1])])
    assert floors(train, test, 4) == pytest.approx((1 / 3, 2 / 3, 1))


def test_naive_bayes_is_that_of_counts_one_by_one():
    rng = np.random.default_rng(0)

    def draw(n):
        tokens = rng.integers(0, 6, (n, 5))
        targets = np.where(rng.random((n, 5)) < 0.5, rng.integers(0, 3, (n, 5)), -1)
        targets[:, -1] = tokens.max(1) // 2
        return Items(tokens, targets, np.full(n, 5), targets[:, -1:])

    train, test = draw(80), draw(60)

    def places(of):
        for tokens, targets in zip(of.tokens_BT.tolist(), of.targets_BT.tolist(), strict=True):
            yield from ((tokens[: t + 1], y) for t, y in enumerate(targets) if y >= 0)

    right, n = 0, 0
    for seen, wanted in places(test):
        scores = []
        for y in range(3):
            bags = [words for words, target in places(train) if target == y]
            total = sum(map(len, bags)) + 6
            score = np.log(len(bags))
            for word in seen:
                score += np.log((sum(bag.count(word) for bag in bags) + 1) / total)
            scores.append(score)
        right, n = right + (int(np.argmax(scores)) == wanted), n + 1
    assert floors(train, test, 6).bag_of_words == pytest.approx(right / n)
