"""Which part of the validation text has a near-copy in training: a number that every source has.

Documents are compared by runs of ids, some 16 bytes of text long (`run_tokens`). The runs of a
document fall into 128 bins by their hashes, and each bin keeps its least hash (one permutation
hashing, Li, Owen and Zhang 2012): two documents agree in as many bins as the Jaccard similarity of
their sets of runs says. Near-copies agree in 0.8 of the bins that either one fills, and so in one
or more of 32 bands of four bins, by which they are found.

    ids of a document   t h e   c a t   s a t   o n …
    runs                [─────][─────]…              one begins at each id
    bins                h₀   h₁   ∞   h₃ │ h₄  ∞ …   least hash of each; ∞ where it is empty
    bands               └─ one hash ───┘

Lines of a log and other texts of one template agree in bands with thousands of others, which are
too many to compare with each: a document is compared with those that share its rarest bands, 64 at
most in a chunk of training and 1,024 in all. Of such texts the share may come out too small.

`near_duplicates`, for `data.near_duplicates=cluster`, clusters documents of both splits by runs of
words, and takes ten times as long: near the threshold the two may differ.

N documents · M bins · R runs · P pairs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BINS, BAND = 128, 4
SIMILARITY = 0.8
RUN_BYTES = 16
"""Five words of code with their punctuation, three of prose."""
CHUNK_TOKENS, CHUNK_DOCUMENTS = 1 << 20, 1 << 16
"""Ids that are hashed at once, of at most so many documents; runs across chunks are not seen."""
LOOKED_AT = 4096
"""Documents of validation, spread evenly, that stand for all: within 1.6% where they are of one
length (95%)."""
COMPARED = 1 << 14
"""Pairs that are compared at once: 16 MB of each side."""
OF_CHUNK, OF_ALL = 64, 1024
"""With how many documents of a chunk, and of all training, one is compared at most."""

EMPTY = ~np.uint64(0)
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Split(NamedTuple):
    """The ids of a split, integers, in shards; its documents' ends and hashes (`DOCUMENT`)."""

    parts: Sequence[np.ndarray]
    documents_N: np.ndarray


class Sketches(NamedTuple):
    """Some whole documents of a split, in their order."""

    first: int
    """The number of the first of them in the split."""
    least_NM: np.ndarray
    """uint64: the least hash of each bin, `EMPTY` where it has none."""


def share(val: Split, train: Split, eos: int, text_bytes: int) -> float:
    """Return which share of the tokens of validation is in documents that have a near-copy in
    training, one that is not the very same. `text_bytes` are those of both splits."""
    tokens = sum(len(part) for split in (val, train) for part in split.parts)
    run = run_tokens(tokens, text_bytes)
    if not len(val.documents_N):
        return 0.0
    chosen = np.unique(np.linspace(0, len(val.documents_N) - 1, LOOKED_AT).astype(np.int64))
    least_NM = [np.empty((0, BINS), np.uint64)]
    for some in sketches(val.parts, eos, run):
        begin, end = np.searchsorted(chosen, (some.first, some.first + len(some.least_NM)))
        least_NM.append(some.least_NM[chosen[begin:end] - some.first])
    tokens_N = np.diff(val.documents_N["end"].astype(np.int64), prepend=0)[chosen]
    copied_N = near_copied(
        np.concatenate(least_NM),
        val.documents_N["hash"][chosen],
        sketches(train.parts, eos, run),
        train.documents_N["hash"],
    )
    return float(tokens_N[copied_N].sum() / tokens_N.sum())


def run_tokens(tokens: int, text_bytes: int) -> int:
    """Return how many ids a run has, a power of two: some 16 bytes of a text of such sizes."""
    return 1 << max(round(np.log2(RUN_BYTES * max(tokens, 1) / max(text_bytes, 1))), 0)


def sketches(parts: Sequence[np.ndarray], eos: int, run: int) -> Iterator[Sketches]:
    """Yield the documents of a split, each of which ends in `eos`."""
    first, open_M = 0, np.full(BINS, EMPTY)  # of a document that goes on in the next chunk
    for part in parts:
        begin = 0
        while begin < len(part):
            chunk = part[begin : begin + CHUNK_TOKENS]
            is_end = chunk == eos
            if len(ends := np.flatnonzero(is_end)) > CHUNK_DOCUMENTS:
                chunk, is_end = (x[: ends[CHUNK_DOCUMENTS - 1] + 1] for x in (chunk, is_end))
            begin += len(chunk)
            document = np.cumsum(is_end) - is_end  # of each id, counted in this chunk
            least_NM = _least(chunk, document, int(is_end.sum()) + 1, run)
            least_NM[0] = np.minimum(least_NM[0], open_M)
            open_M = least_NM[-1]
            if len(least_NM) > 1:
                yield Sketches(first, least_NM[:-1])
            first += len(least_NM) - 1


def _least(ids: np.ndarray, document: np.ndarray, n: int, run: int) -> np.ndarray:
    """Return the least hashes of `n` documents, uint64 `[n, 128]`."""
    least_NM = np.full((n, BINS), EMPTY)
    if len(ids) < run:
        return least_NM
    hash_R, width = ids.astype(np.uint64), 1
    while width < run:  # a run of twice the length is two, one behind the other: a polynomial
        hash_R = hash_R[:-width] * np.uint64(pow(int(_MIX), width, 1 << 64)) + hash_R[width:]
        width *= 2
    of_one_R = document[: len(hash_R)] == document[run - 1 :]
    hash_R, document_R = _mixed(hash_R[of_one_R]), document[: len(hash_R)][of_one_R]
    place_R = document_R * BINS + (hash_R >> np.uint64(57)).astype(np.int64)
    np.minimum.at(least_NM.reshape(-1), place_R, hash_R)
    return least_NM


def _mixed(hash_R: np.ndarray) -> np.ndarray:
    hash_R = (hash_R ^ (hash_R >> np.uint64(32))) * _MIX
    return hash_R ^ (hash_R >> np.uint64(29))


def near_copied(
    val_NM: np.ndarray, val_hash_N: np.ndarray, train: Iterator[Sketches], train_hash_N: np.ndarray
) -> np.ndarray:
    """Return which documents of validation, uint64 `[N, 128]`, have a near-copy in training, bool
    `[N]`. Documents of one hash are the same, and no near-copies of each other; one that is shorter
    than a run has none."""
    copied_N, compared_N = np.zeros(len(val_NM), dtype=bool), np.zeros(len(val_NM), dtype=int)
    for some in train:
        hash_N = train_hash_N[some.first : some.first + len(some.least_NM)]
        once = np.unique(hash_N, return_index=True)[1]
        left = np.flatnonzero(~copied_N & (compared_N < OF_ALL))
        v_P, t_P = _candidates(val_NM[left], some.least_NM[once])
        v_P, t_P = left[v_P], once[t_P]
        differ_P = val_hash_N[v_P] != hash_N[t_P]
        v_P, t_P = v_P[differ_P], t_P[differ_P]
        compared_N += np.bincount(v_P, minlength=len(val_NM))
        for begin in range(0, len(v_P), COMPARED):
            v, t = v_P[begin : begin + COMPARED], t_P[begin : begin + COMPARED]
            copied_N[v[similarity(val_NM[v], some.least_NM[t]) >= SIMILARITY]] = True
    return copied_N


def similarity(a_PM: np.ndarray, b_PM: np.ndarray) -> np.ndarray:
    """Return the Jaccard similarity of pairs of documents as their least hashes tell it, float64
    `[P]`; 0 for two without runs."""
    filled_P = ((a_PM != EMPTY) | (b_PM != EMPTY)).sum(1)
    return ((a_PM == b_PM) & (a_PM != EMPTY)).sum(1) / np.maximum(filled_P, 1)


def _candidates(val_NM: np.ndarray, train_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows that agree in a band which is not empty, int64 `[P]` twice: at most
    `OF_CHUNK` of a row of `val_NM`, in the bands that it shares with the fewest."""
    n_bands = BINS // BAND
    low_NB, many_NB = np.zeros((2, len(val_NM), n_bands), dtype=np.int64)
    order = []
    for band in range(n_bands):
        bins = slice(band * BAND, (band + 1) * BAND)
        (a_N, in_a), (b_N, in_b) = (_band(x[:, bins]) for x in (val_NM, train_NM))
        by_hash = np.argsort(b_N, kind="stable")
        low, high = (np.searchsorted(b_N[by_hash], a_N, side) for side in ("left", "right"))
        low_NB[in_a, band], many_NB[in_a, band] = low, high - low
        order.append(in_b[by_hash])
    rarest_NB = np.argsort(many_NB, axis=1, kind="stable")
    sorted_NB = np.take_along_axis(many_NB, rarest_NB, 1)
    room_NB = OF_CHUNK - (np.cumsum(sorted_NB, axis=1) - sorted_NB)
    np.put_along_axis(many_NB, rarest_NB, np.minimum(sorted_NB, np.maximum(room_NB, 0)), 1)
    pairs = [np.empty(0, np.int64)]
    for band, place_N in enumerate(order):
        low_N, many_N = low_NB[:, band], many_NB[:, band]
        first_N = low_N - np.cumsum(many_N) + many_N
        place_P = np.arange(many_N.sum()) + np.repeat(first_N, many_N)
        v_P = np.repeat(np.arange(len(val_NM)), many_N)
        pairs.append(v_P * len(train_NM) + place_N[place_P])
    pair_P = np.unique(np.concatenate(pairs))
    return pair_P // max(len(train_NM), 1), pair_P % max(len(train_NM), 1)


def _band(least_NB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of a band of each document that fills a bin of it, and which those are."""
    filled = np.flatnonzero((least_NB != EMPTY).any(1))
    hash_N = np.zeros(len(filled), dtype=np.uint64)
    for column_N in least_NB[filled].T:
        hash_N = _mixed(hash_N * _MIX + column_N)
    return hash_N, filled
