import errno
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headway.config import DataConfig
from headway.data import cache, parts, shards, tokenise
from headway.data.shard_file import ShardWriter, Tokens
from headway.data.shards import prepare
from headway.data.tokenizer import train_bpe
from tests.data.cached import BYTES, all_ids, folder_of, mistake, quiet


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"document {i} ü\n" * (i + 1))
    return DataConfig(source=(str(folder),), cache_dir=str(tmp_path / "cache"), val_fraction=0.2)


def test_every_document_is_there_once_and_ends_with_eos(config):
    data = prepare(config, BYTES, quiet)
    (source,) = data.sources
    found = []
    for tokens in (source.train, source.val):
        ids = all_ids(tokens)
        assert ids[-1] == 256
        found += [BYTES.decode(part) for part in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]
        assert tokens.documents == (ids == 256).sum()
        assert tokens.text_bytes == (ids != 256).sum()
    wanted = [path.read_text() for path in Path(config.source[0]).iterdir()]
    assert sorted(found) == sorted(wanted)
    assert (source.train.documents, source.val.documents) == (16, 4)
    assert data.train_tokens + data.val_tokens == sum(len(t.encode()) + 1 for t in wanted)


def test_manifest_says_what_is_there(config):
    prepare(config, BYTES, quiet)
    folder = folder_of(config)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dtype"] == "uint16" and manifest["vocab_size"] == 257
    for part in manifest["splits"].values():
        assert part["tokens"] == sum(shard["tokens"] for shard in part["shards"])
        assert part["documents"] == sum(shard["documents"] for shard in part["shards"])
        for shard in part["shards"]:
            assert (folder / shard["file"]).stat().st_size == shard["bytes"] == 2 * shard["tokens"]
    assert not list(Path(config.cache_dir).glob(".*tmp*"))


def test_second_call_reads_the_cache(config, monkeypatch):
    first = prepare(config, BYTES, quiet)
    monkeypatch.setattr(shards, "tokenise", None)
    lines = []
    again = prepare(config, BYTES, lines.append, verify=True)
    assert again.fingerprint == first.fingerprint
    (line,) = lines
    assert line.endswith(
        "data: 20 files (20 .txt); 0.0 MB of text; documents: 16 for training, 4 for validation; "
        f"tokens: {first.train_tokens:,} and {first.val_tokens:,}; "
        "0.0% of the validation text has a near-copy in training"
    )
    mixed = replace(config, weights=(3.0,), seq_len=7, batch_size=3, doc_mask=True)
    assert prepare(mixed, BYTES, quiet).fingerprint == first.fingerprint


def test_changed_text_tokenizer_or_split_is_tokenised_again(config, tmp_path):
    seen = {prepare(config, BYTES, quiet).fingerprint}
    (Path(config.source[0]) / "00.txt").write_text("changed")
    seen.add(prepare(config, BYTES, quiet).fingerprint)
    seen.add(prepare(replace(config, val_fraction=0.4), BYTES, quiet).fingerprint)
    bpe = train_bpe(["document document"] * 9, 260, tmp_path / "t.json")
    seen.add(prepare(config, bpe, quiet).fingerprint)
    assert len(seen) == 4


def test_text_that_changes_but_for_size_and_time_is_tokenised_again(config):
    """As when `cp -p`, rsync or tar put another version in its place."""
    path = Path(config.source[0]) / "00.txt"
    first, stat = prepare(config, BYTES, quiet), path.stat()
    path.write_text(path.read_text().replace("document 0", "tnemucod 0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepare(config, BYTES, quiet).fingerprint != first.fingerprint


def test_skipped_documents_are_counted_and_the_first_five_named(config):
    good = prepare(config, BYTES, quiet)
    lines = "".join(f"{{{i}\n" for i in range(9))
    (Path(config.source[0]) / "bad.jsonl").write_text(lines)
    assert "bad.jsonl:1 is not JSON" in mistake(config)
    for _ in range(2):  # the second time from the cache
        said = []
        data = prepare(replace(config, skip_bad=True), BYTES, said.append)
        assert data.train_tokens + data.val_tokens == good.train_tokens + good.val_tokens
        said = [line for line in said if not line.startswith("tokenis")]
        assert said[0].endswith("skipped, as they cannot be read: 9") and len(said) == 6
        assert [f"bad.jsonl:{i} is not JSON" in said[i] for i in range(1, 6)] == [True] * 5


def test_fingerprint_does_not_depend_on_the_place(config, tmp_path):
    first = prepare(config, BYTES, quiet)
    Path(config.source[0]).rename(tmp_path / "elsewhere")
    moved = replace(config, source=(str(tmp_path / "elsewhere"),), cache_dir=str(tmp_path / "c2"))
    assert prepare(moved, BYTES, quiet).fingerprint == first.fingerprint


def test_sources_share_the_cache_in_any_mixture(config, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text("some other text " * 20)
    both = replace(config, source=(*config.source, str(tmp_path / "other.txt")))
    data = prepare(both, BYTES, quiet)
    assert [len(source.train) > 0 for source in data.sources] == [True, True]
    monkeypatch.setattr(shards, "tokenise", None)
    swapped = replace(both, source=both.source[::-1])
    assert prepare(swapped, BYTES, quiet).fingerprint != data.fingerprint
    prepare(config, BYTES, quiet)


@pytest.mark.parametrize("shard_tokens", [1, 7, 100])
def test_reading_across_shards(tmp_path, shard_tokens):
    ids = np.random.default_rng(0).integers(0, 256, 173)
    dtype = np.dtype("<u2")
    writer = ShardWriter(tmp_path, "train", 256, dtype, shard_tokens)
    for part in np.split(ids, [50, 51, 120]):
        writer.write(part, len(part), 0)
    writer.write(np.array([256]), 0, 1)
    split = writer.close()
    assert len(split["shards"]) == -(-174 // shard_tokens)
    assert max(shard["tokens"] for shard in split["shards"]) <= shard_tokens
    tokens = Tokens(tmp_path, split, dtype, BYTES.token_bytes, verify=True)
    ring = np.tile(np.append(ids, 256), 3)
    for start, length in [(0, 174), (0, 1), (173, 1), (99, 3), (170, 20), (5, 400)]:
        out = np.empty(length, dtype=np.int64)
        tokens.read(start, out)
        assert np.array_equal(out, ring[start : start + length])


def test_large_vocabulary_takes_uint32(tmp_path):
    class Wide:
        vocab_size, eos, fingerprint = 70_000, 69_999, "wide"
        token_bytes = np.ones(70_000, dtype=np.int64)
        token_texts = [b"x"] * 70_000

        def encode(self, text):
            return np.array([69_000 + ord(char) % 900 for char in text], dtype=np.uint32)

        def encode_batch(self, texts):
            return [self.encode(text) for text in texts]

        def decode(self, ids):
            return ""

    (tmp_path / "t.txt").write_text("abc" * 100)
    config = DataConfig(source=(str(tmp_path / "t.txt"),), cache_dir=str(tmp_path / "c"))
    data = prepare(config, Wide(), quiet)
    assert all_ids(data.sources[0].train)[:3].tolist() == [69_097, 69_098, 69_099]
    assert json.loads((folder_of(config) / "manifest.json").read_text())["dtype"] == "uint32"


def test_progress_is_reported(config, monkeypatch):
    monkeypatch.setattr(tokenise, "PROGRESS_SECONDS", -1.0)
    monkeypatch.setattr(parts, "BATCH_CHARS", 100)
    lines = []
    prepare(config, BYTES, lines.append)
    assert len(lines) > 5
    assert lines[0].startswith("tokenising ") and "MB/s" in lines[0]
    assert lines[-2].startswith("tokenised ") and "by 1 process" in lines[-2]


def test_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    assert cache.root_of(DataConfig()) == tmp_path
    assert cache.root_of(DataConfig(cache_dir="x")) == Path("x")
    monkeypatch.delenv("HEADWAY_CACHE")
    assert cache.root_of(DataConfig()) == Path.home() / ".cache" / "headway"


def test_cache_inside_the_data_is_refused(config):
    inside = replace(config, cache_dir=config.source[0] + "/cache")
    assert "lies inside data source" in mistake(inside)
    hidden = replace(config, cache_dir=config.source[0] + "/.cache")
    assert prepare(hidden, BYTES, quiet).train_tokens > 0


def _killed_midway(config):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "close", die)
        prepare(config, BYTES, quiet)


def test_killed_prepare_leaves_nothing_that_counts(config):
    child = multiprocessing.get_context("fork").Process(target=_killed_midway, args=(config,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    root = Path(config.cache_dir)
    assert len(list(root.glob(".*tmp*"))) == 1
    data = prepare(config, BYTES, quiet, verify=True)
    assert data.sources[0].train.documents == 16
    assert not list(root.glob(".*tmp*"))


def _prepare_and_count(config, queue):
    lines = []
    data = prepare(config, BYTES, lines.append)
    queue.put((data.fingerprint, sum(line.startswith("tokenised") for line in lines)))


def test_concurrent_prepares_tokenise_once(config):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_prepare_and_count, args=(config, queue)) for _ in range(4)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert len({fingerprint for fingerprint, _ in results}) == 1
    assert sum(count for _, count in results) == 1


def test_race_without_locks_is_harmless(config, monkeypatch):
    def no_lock(_file, _how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(cache.fcntl, "flock", no_lock)
    real = tokenise._join

    def slow(*args):
        monkeypatch.setattr(tokenise, "_join", real)
        prepare(config, BYTES, quiet)  # somebody else is faster, and removes the parts
        return real(*args)

    monkeypatch.setattr(tokenise, "_join", slow)
    assert prepare(config, BYTES, quiet, verify=True).train_tokens > 0
    assert not list(Path(config.cache_dir).glob(".*tmp*"))


# ---- mistakes in the config ----


@pytest.mark.parametrize(
    "change, said",
    [
        ({"source": ()}, "data.source is empty"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 sources"),
        ({"weights": (0.0,)}, "weight 0.0"),
        ({"weights": (-1.0,)}, "weight -1.0"),
        ({"weights": (float("nan"),)}, "weight nan"),
        ({"weights": (float("inf"),)}, "weight inf"),
        ({"val_fraction": 0.0}, "val_fraction 0.0"),
        ({"val_fraction": 1.0}, "val_fraction 1.0"),
        ({"val_fraction": float("nan")}, "val_fraction nan"),
        ({"seq_len": 0}, "data.seq_len=0 is below 1"),
        ({"batch_size": 0}, "data.batch_size=0 is below 1"),
        ({"source": ("/no/such/place",)}, "does not exist"),
    ],
)
def test_config_mistakes(config, change, said):
    assert said in mistake(replace(config, **change))


def test_source_without_text(config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    message = mistake(replace(config, source=(str(tmp_path / "empty.txt"),)))
    assert "empty.txt" in message and "holds no text" in message
    assert not [path for path in Path(config.cache_dir).iterdir() if path.is_dir()]
