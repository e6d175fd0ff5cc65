"""What a guess reaches that understands nothing of a world: floors beside every score."""

from typing import NamedTuple

import numpy as np

from headway.data.worlds.world import Items

_CELLS = 1 << 22
"""Counts that are in memory at once."""


class Floors(NamedTuple):
    """Shares of the targets that shallow rules guess; what they know is of training items."""

    most_frequent: float
    """The most frequent target, always."""
    last_mentioned: float
    """The last word, up to the target's place, that has ever been a target."""
    bag_of_words: float
    """Naive Bayes over the words up to the target's place, whatever their order (with Laplace's
    rule for counts)."""


def floors(train: Items, test: Items, n_words: int) -> Floors:
    """Return the floors of `test`; `n_words` is the size of the vocabulary."""
    count_V = np.bincount(train.targets_BT[train.targets_BT >= 0], minlength=n_words)
    frequent = int(count_V.argmax())
    target_T = test.targets_BT[test.targets_BT >= 0]
    last_T = _last_mentioned(test, count_V > 0, frequent)
    bag_T = _naive_bayes(train, test, count_V)
    guesses = (np.full_like(target_T, frequent), last_T, bag_T)
    return Floors(*(float((guess_T == target_T).mean()) for guess_T in guesses))


def _last_mentioned(items: Items, is_target_V: np.ndarray, otherwise: int) -> np.ndarray:
    """Return the guess at each target, in the order of `targets_BT[targets_BT >= 0]`."""
    tokens_BT = items.tokens_BT
    place_T = np.arange(tokens_BT.shape[1])
    fits_BT = (tokens_BT >= 0) & is_target_V[tokens_BT]
    last_BT = np.maximum.accumulate(np.where(fits_BT, place_T, -1), axis=1)
    word_BT = np.take_along_axis(tokens_BT, last_BT.clip(0), axis=1)
    return np.where(last_BT >= 0, word_BT, otherwise)[items.targets_BT >= 0]


def _naive_bayes(train: Items, test: Items, count_V: np.ndarray) -> np.ndarray:
    """Return the likeliest target by the words up to it, in the same order."""
    V = len(count_V)
    class_C = np.flatnonzero(count_V)
    number_V = np.zeros(V, dtype=np.int64)
    number_V[class_C] = np.arange(len(class_C))
    seen_CV = np.ones((len(class_C), V), dtype=np.float32)
    for bag_TV, target_T in _bags(train, V):
        np.add.at(seen_CV, number_V[target_T], bag_TV)
    weight_CV = np.log(seen_CV / seen_CV.sum(1, keepdims=True))
    prior_C = np.log(count_V[class_C]).astype(np.float32)
    guesses = [class_C[(bag_TV @ weight_CV.T + prior_C).argmax(1)] for bag_TV, _ in _bags(test, V)]
    return np.concatenate(guesses)


def _bags(items: Items, V: int):
    """Yield, for some items at a time, how often each word came up to each target, float32
    [targets, V], and the targets."""
    B, T = items.tokens_BT.shape
    size = max(1, _CELLS // (T * V))
    for begin in range(0, B, size):
        tokens_BT = items.tokens_BT[begin : begin + size]
        targets_BT = items.targets_BT[begin : begin + size]
        once_BTV = np.zeros((*tokens_BT.shape, V), dtype=np.float32)
        row, place = np.nonzero(tokens_BT >= 0)
        once_BTV[row, place, tokens_BT[row, place]] = 1
        asked_BT = targets_BT >= 0
        yield once_BTV.cumsum(1)[asked_BT], targets_BT[asked_BT]
