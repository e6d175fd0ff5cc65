"""The share of the validation text with a near-copy in training, beside brute force."""

import json
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import DataConfig
from headway.data import near_copies
from headway.data.document_index import DOCUMENT
from headway.data.near_copies import Split, run_tokens, share, similarity, sketches
from headway.data.shards import prepare
from headway.data.tokenizer import load_tokenizer

EOS, RUN = 256, 16
TOKENS = 400


def split(documents, shards=1):
    """Return a split of documents, arrays of ids without eos, in so many shards."""
    whole = [np.append(ids, EOS).astype(np.uint16) for ids in documents]
    rows_N = np.empty(len(whole), dtype=DOCUMENT)
    rows_N["end"] = np.cumsum([len(ids) for ids in whole])
    rows_N["hash"] = [hash(ids.tobytes()) % (1 << 64) for ids in whole]
    return Split(np.array_split(np.concatenate(whole), shards), rows_N)


def edited(ids, n, rng):
    """Return a copy in which n ids are others."""
    copy, places = ids.copy(), rng.choice(len(ids), n, replace=False)
    copy[places] = (copy[places] + rng.integers(1, 255, n)) % 256
    return copy


def jaccard(a, b, run=RUN):
    """Return the similarity of two documents by their sets of runs, of which one has the eos."""
    a, b = np.append(a, EOS), np.append(b, EOS)
    of_a, of_b = ({x[i : i + run].tobytes() for i in range(len(x) - run + 1)} for x in (a, b))
    return len(of_a & of_b) / len(of_a | of_b)


def least(documents, shards=1, run=RUN):
    some = sketches(split(documents, shards).parts, EOS, run)
    return np.concatenate([sketch.least_NM for sketch in some])


@pytest.mark.parametrize("run", (4, 16))
def test_similarity_is_that_of_the_sets_of_runs(run):
    rng = np.random.default_rng(0)
    first = [rng.integers(0, 256, 2000) for _ in range(40)]
    others = [edited(ids, 5 * n, rng) for n, ids in enumerate(first)]
    true_P = np.array([jaccard(a, b, run) for a, b in zip(first, others, strict=True)])
    assert true_P.min() < 0.6 and true_P[0] == 1
    off_P = similarity(least(first, run=run), least(others, run=run)) - true_P
    assert abs(off_P).max() < 4 * 0.5 / 128**0.5  # the deviation of 128 draws is at most that
    assert abs(off_P.mean()) < 4 * 0.5 / (40 * 128) ** 0.5
    strangers = similarity(least(first[:20]), least(first[20:]))
    assert strangers.max() < 0.05


@given(seed=st.integers(0, 2**16), shards=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_sketches_do_not_depend_on_neighbours_and_little_on_shards(seed, shards):
    """A document alone has the least hashes that it has among others; a border between shards, or
    chunks, costs it the runs across, so that its hashes are not below those of the whole."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 256, n) for n in rng.integers(0, 90, 12)]
    whole = least(documents)
    for ids, least_M in zip(documents, whole, strict=True):
        np.testing.assert_array_equal(least([ids])[0], least_M)
        assert (least_M == near_copies.EMPTY).all() == (len(ids) + 1 < RUN)
    with mock.patch.object(near_copies, "CHUNK_DOCUMENTS", 1 + seed % 5):
        np.testing.assert_array_equal(least(documents), whole)
    cut = least(documents, shards)
    assert cut.shape == whole.shape and (cut >= whole).all()
    assert (cut != whole).sum() <= (shards - 1) * (RUN - 1)


def test_share_by_hand(monkeypatch):
    """Of five validation documents the edited one counts, alone: not the one that is the very same
    in training, the one that is edited too much, the short one or the one that nobody has."""
    rng = np.random.default_rng(1)
    same, near, far, alone = (rng.integers(0, 256, 100 * n) for n in (4, 6, 8, 10))
    short = np.arange(RUN - 2)
    train = [same, edited(near, 1, rng), edited(far, 60, rng), short + 1, rng.integers(0, 256, 99)]
    val = split([same, near, far, short, alone])
    assert jaccard(near, train[1]) > 0.9 and jaccard(far, train[2]) < 0.4
    tokens = 400 + 600 + 800 + 14 + 1000 + 5
    text_bytes = tokens + sum(map(len, train))
    for chunk in (1 << 20, 512):
        monkeypatch.setattr(near_copies, "CHUNK_TOKENS", chunk)
        for order in (train, train[::-1], [*train, edited(near, 2, rng)]):
            assert share(val, split(order, 2), EOS, text_bytes) == 601 / tokens
    assert share(val, split([same, same]), EOS, text_bytes) == 0
    assert share(split([short]), split(train), EOS, text_bytes) == 0


def test_texts_of_one_template_are_compared_with_few_others(monkeypatch):
    """As lines of a log are: alike in half of their runs, each with all. What shares its rarest bands
    is found among them, and the work grows with the documents and not with their square."""
    rng = np.random.default_rng(4)
    template = rng.integers(0, 256, 300)

    def line():
        return np.concatenate([template, rng.integers(0, 256, 300)])

    train = [line() for _ in range(150)]
    val = [line() for _ in range(40)] + [edited(train[n], 1, rng) for n in (3, 77, 140)]
    pairs = []

    def counted(a_PM, b_PM):
        pairs.append(len(a_PM))
        return similarity(a_PM, b_PM)

    monkeypatch.setattr(near_copies, "similarity", counted)
    monkeypatch.setattr(near_copies, "OF_CHUNK", 4)
    for chunk, of_all in ((1 << 20, 1024), (9000, 12)):
        monkeypatch.setattr(near_copies, "CHUNK_TOKENS", chunk)
        monkeypatch.setattr(near_copies, "OF_ALL", of_all)
        pairs.clear()
        copied = share(split(val), split(train), EOS, 200 * 601)
        assert 43 < sum(pairs) <= 43 * min(4 * -(-150 * 601 // chunk), of_all + 3)
        if of_all > 12:
            assert copied == pytest.approx(3 / 43)


def test_copies_of_one_document_are_one_candidate():
    rng = np.random.default_rng(5)
    base = rng.integers(0, 256, TOKENS)
    train = [base] * 99 + [edited(base, 1, rng)]
    assert share(split([base]), split(train), EOS, 101 * TOKENS) == 1


def test_many_pairs_are_compared_in_parts(monkeypatch):
    rng = np.random.default_rng(2)
    base = rng.integers(0, 256, TOKENS)
    train, val = ([edited(base, 1, rng) for _ in range(20)] for _ in range(2))
    val.append(rng.integers(0, 256, TOKENS))
    for compared in (1 << 14, 7):
        monkeypatch.setattr(near_copies, "COMPARED", compared)
        assert share(split(val), split(train), EOS, 41 * TOKENS) == pytest.approx(20 / 21)


def test_runs_are_as_long_in_text_whatever_the_tokenizer():
    assert [run_tokens(1000, 1000 * n) for n in (1, 2, 4, 5, 16, 99)] == [16, 8, 4, 4, 1, 1]
    assert run_tokens(0, 0) == 16


def test_every_run_is_told(tmp_path):
    """Of bytes, and of another tokenizer; and the option that the line names leaves none."""
    pytest.importorskip("datasketch")
    words = [f"word{n}" for n in np.random.default_rng(3).integers(0, 10**6, 3000)]
    texts = [" ".join(words[50 * (n % 60) :][:200]) + f" end {n}." for n in range(200)]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DataConfig(source=(str(path),), cache_dir=str(tmp_path / "cache"), seq_len=8)
    said = []
    prepare(config, load_tokenizer("bytes"), said.append)
    hint = " (--data.near-duplicates cluster puts near-copies into one split)"
    line = "100.0% of the validation text has a near-copy in training"
    assert said[-1].endswith(line + hint)
    prepare(replace(config, near_duplicates="cluster"), load_tokenizer("bytes"), said.append)
    assert "; 0.0% of the validation text has a near-copy in training; near-dup" in said[-1]
