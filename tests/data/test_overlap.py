"""Documents that are in validation and in training, counted by hand; and what `dedup` leaves."""

import json
from dataclasses import replace

import numpy as np
import pytest

from headway.config import DataConfig, UsageError
from headway.data import document_index
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.data.validation import validation_text

BYTES = load_tokenizer("bytes")


def quiet(_line):
    pass


def write(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


@pytest.fixture
def config(tmp_path):
    """Two sources that share documents with each other and repeat their own."""
    a = write(tmp_path / "a.jsonl", [f"document {i % 43}" for i in range(60)])
    b = write(tmp_path / "b.jsonl", [f"document {i * i % 97}" for i in range(80)])
    cache = str(tmp_path / "cache")
    return DataConfig(source=(a, b), cache_dir=cache, val_fraction=0.2, seq_len=8, batch_size=2)


def ids_of(tokens):
    out = np.empty(len(tokens), dtype=np.int64)
    tokens.read(0, out)
    return out


def texts(tokens):
    ids = ids_of(tokens)
    return [BYTES.decode(part) for part in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]


def test_leaks_are_counted_over_all_sources(config):
    both = prepare(config, BYTES, quiet)
    train = {text for source in both.sources for text in texts(source.train)}
    val = [text for source in both.sources for text in texts(source.val)]
    shared = sum(text in train for text in val)
    assert 0 < shared < len(val) == 28
    assert (both.overlap.shared, both.overlap.validation_documents) == (shared, 28)
    assert both.notes == (
        f"{shared} of 28 validation documents are also in training; "
        "--data.dedup exact leaves them out of training",
    )
    alone = [prepare(replace(config, source=(spec,)), BYTES, quiet) for spec in config.source]
    for data in alone:
        (source,) = data.sources
        own = set(texts(source.train))
        assert data.overlap.shared == sum(text in own for text in texts(source.val))
    assert sum(data.overlap.shared for data in alone) < shared


def test_all_of_them(tmp_path):
    source = write(tmp_path / "t.jsonl", [f"one of three: {i % 3}" for i in range(200)])
    config = DataConfig(source=(source,), cache_dir=str(tmp_path / "cache"), seq_len=8)
    data = prepare(config, BYTES, quiet)
    assert data.overlap.sentence == "10 of 10 validation documents are also in training"
    without = replace(config, dedup="exact", batch_size=1)
    left = prepare(without, BYTES, quiet)
    assert len(left.sources[0].train) == 0  # validation holds each of the three
    with pytest.raises(UsageError, match="has 0 training tokens, one window needs 9"):
        Stream(left, without, 0)


def test_exact_keeps_the_first_of_each_text_that_is_not_in_validation(config):
    before = prepare(config, BYTES, quiet)
    after = prepare(replace(config, dedup="exact"), BYTES, quiet)
    seen = {text for source in before.sources for text in texts(source.val)}
    held = [text for source in before.sources for text in texts(source.train)]
    shared = sum(text in seen for text in held)
    for old, new in zip(before.sources, after.sources, strict=True):
        assert texts(new.val) == texts(old.val)
        wanted = []
        for text in texts(old.train):
            if text not in seen:
                seen.add(text)
                wanted.append(text)
        assert texts(new.train) == wanted and new.train.documents == len(wanted)
    left = [text for source in after.sources for text in texts(source.train)]
    assert len(set(left)) == len(left)
    repeated = len(held) - shared - len(left)
    assert (after.overlap.removed_shared, after.overlap.removed_repeated) == (shared, repeated)
    assert after.notes == (
        "0 of 28 validation documents are also in training; left out of training: "
        f"{shared} documents that are in validation, {repeated} that were there already",
    )
    assert after.fingerprint != before.fingerprint
    assert prepare(replace(config, dedup="exact"), BYTES, quiet).fingerprint == after.fingerprint
    a, b = (
        validation_text(Stream(data, c, 0), 40)
        for data, c in ((before, config), (after, replace(config, dedup="exact")))
    )
    assert a == b


def test_what_stays_is_read_from_any_place_on(config):
    data = prepare(replace(config, dedup="exact"), BYTES, quiet)
    train = data.sources[0].train
    ring = np.tile(ids_of(train), 3)
    for start in range(0, len(train), 5):
        for length in (1, 9, 40, len(train)):
            out = np.empty(length, dtype=np.int64)
            train.read(start, out)
            assert np.array_equal(out, ring[start : start + length])


def test_nothing_to_leave_out_changes_nothing(tmp_path):
    source = write(tmp_path / "t.jsonl", [f"document {i}" for i in range(40)])
    config = DataConfig(source=(source,), cache_dir=str(tmp_path / "cache"))
    plain = prepare(config, BYTES, quiet)
    exact = prepare(replace(config, dedup="exact"), BYTES, quiet)
    assert plain.fingerprint == exact.fingerprint and plain.notes == exact.notes == ()
    assert plain.overlap.sentence == "0 of 2 validation documents are also in training"


def test_an_index_does_not_depend_on_shards_and_chunks(monkeypatch):
    words = ["a", "bc", "a", "", "déf", "bc", "é"]
    ids = np.concatenate([np.append(BYTES.encode(word), 256) for word in words]).astype("<u2")
    rows, shown, text = document_index._scan([ids], BYTES, True)
    assert rows["end"].tolist() == np.cumsum([len(w.encode()) + 1 for w in words]).tolist()
    same = [[a == b for b in words] for a in words]
    assert (rows["hash"][:, None] == rows["hash"]).tolist() == same
    assert shown == sum(len(word.encode()) for word in words)
    monkeypatch.setattr(document_index, "CHUNK_TOKENS", 3)
    again = document_index._scan([ids[:4], ids[4:5], ids[5:]], BYTES, True)
    assert np.array_equal(rows, again[0]) and again[1:] == (shown, text)
    other = document_index._scan([np.append(ids[ids < 256], 256).astype("<u2")], BYTES, True)
    assert other[2] != text, "documents that end elsewhere are another text"
