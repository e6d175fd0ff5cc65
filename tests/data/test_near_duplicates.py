import random
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from headway.config import DataConfig, UsageError
from headway.data.document import validation_numbers
from headway.data.near_duplicates import MINIMA, clusters, minima
from headway.data.shards import prepare
from tests.data.test_overlap import BYTES, quiet, texts, write


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text)
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def similarity(a: str, b: str) -> float:
    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def story(seed: int, n_words: int = 300, changed: int = 0) -> str:
    """Words that only this seed has; the last `changed` of them are others."""
    draw = random.Random(seed)
    words = [f"w{draw.randrange(40)}x{seed}" for _ in range(n_words)]
    words[n_words - changed :] = [f"other{draw.randrange(10**6)}" for _ in range(changed)]
    return " ".join(words) + "."


@pytest.mark.parametrize("changed", [0, 10, 60, 200])
def test_equal_minima_estimate_the_similarity(changed):
    pairs = [(story(seed), story(seed, changed=changed)) for seed in range(12)]
    exact = np.mean([similarity(*pair) for pair in pairs])
    estimate = np.mean([(minima(a) == minima(b)).mean() for a, b in pairs])
    assert abs(exact - estimate) < 4 * (0.25 / (MINIMA * len(pairs))) ** 0.5
    assert changed or estimate == 1.0


def test_short_texts_are_alike_if_they_are_equal():
    assert (minima("one two") == minima("one  two")).all()
    assert (minima("one two") == minima("two one")).mean() < 0.1
    assert (minima("") == minima(" \n")).all()


def test_clusters_are_led_by_their_first_document():
    documents = [story(0), story(1), story(0, changed=9), story(2), story(0, changed=18), story(1)]
    near = clusters(np.array([minima(text) for text in documents]))
    assert near.leader_N.tolist() == [0, 1, 0, 3, 0, 1]
    assert (near.clusters, near.documents) == (2, 5)
    size = np.array([1, 10, 100, 1000, 10_000, 100_000])
    is_val = np.array([False, True, True, True, False, True])
    assert near.copied_bytes(size, is_val) == 100  # story(1) is nowhere in training
    is_val[1] = False
    assert near.copied_bytes(size, is_val) == 100_100
    nothing = clusters(np.empty((0, MINIMA), np.uint64))
    assert (nothing.clusters, len(nothing.leader_N)) == (0, 0)


@pytest.fixture
def config(tmp_path):
    """100 documents, every third of which is a near-copy of one of two."""
    documents = [story(i % 6, changed=i % 9) if i % 3 == 0 else story(100 + i) for i in range(100)]
    source = (write(tmp_path / "a.jsonl", documents),)
    cache = str(tmp_path / "cache")
    return DataConfig(source=source, cache_dir=cache, val_fraction=0.2, seq_len=8, batch_size=2)


def crossing(dataset) -> float:
    """The share of validation bytes with a near-copy in training, pair by pair."""
    [source] = dataset.sources
    train, val = texts(source.train), texts(source.val)
    copied = [max(similarity(text, other) for other in train) > 0.8 for text in val]
    return sum(len(t) for t, c in zip(val, copied, strict=True) if c) / sum(map(len, val))


def test_a_cluster_is_in_one_split(config):
    lines = []
    apart = prepare(config, BYTES, quiet)
    together = prepare(replace(config, near_duplicates="cluster"), BYTES, lines.append)
    assert crossing(together) == 0 < crossing(apart)
    every = [sorted(texts(s.train) + texts(s.val)) for d in (apart, together) for s in d.sources]
    assert every[0] == every[1], "no document is lost"
    said = f"{crossing(apart):.1%} of the bytes of validation would have a near-copy in training"
    assert any("in 2 clusters, each in one split" in line and said in line for line in lines)
    [source] = together.sources
    # documents without near-copies are where they were
    numbers, chosen = validation_numbers(config.val_fraction), set()
    while not chosen or max(chosen) < 100:
        chosen.add(next(numbers))
    alone = [story(100 + i) for i in chosen if i < 100 and i % 3]
    assert set(alone) <= set(texts(source.val))


def test_documents_that_are_skipped_are_no_cluster(config, tmp_path):
    """skip_bad and near_duplicates together."""
    path = tmp_path / "a.jsonl"
    good = path.read_text()
    path.write_text(good + '\n{"text": null}\n{"text": 3}\nno json\n')
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.txt").write_bytes(b"\xff" if i in (3, 5) else story(i).encode())
    lines = []
    options = {"near_duplicates": "cluster", "skip_bad": True, "source": (str(path), str(folder))}
    both = prepare(replace(config, **options), BYTES, lines.append)
    assert any("34 documents in 2 clusters" in line for line in lines)
    assert any("0 documents in 0 clusters" in line for line in lines)
    plain = prepare(replace(config, skip_bad=True, source=options["source"]), BYTES, quiet)
    for a, b in zip(both.sources, plain.sources, strict=True):
        assert sorted(texts(a.train) + texts(a.val)) == sorted(texts(b.train) + texts(b.val))


def test_processes_change_nothing(config, tmp_path):
    config = replace(config, near_duplicates="cluster")
    other = replace(config, workers=2, cache_dir=str(tmp_path / "other"))
    one, two = (prepare(c, BYTES, quiet) for c in (replace(config, workers=1), other))
    assert one.fingerprint == two.fingerprint


def test_without_datasketch_it_is_one_line(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UsageError, match=r"near_duplicates=cluster needs datasketch: pip install"):
        prepare(replace(config, near_duplicates="cluster"), BYTES, quiet)
    prepare(config, BYTES, quiet)
