"""A cache that is damaged, or cannot be written or read, is one line; nothing wrong is ever handed out."""

import errno
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headway.config import DataConfig, UsageError
from headway.data import shard_file
from headway.data.shards import prepare
from headway.data.stream import Stream
from tests.data.cached import BYTES, folder_of, mistake, quiet


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"document {i} ü\n" * (i + 1))
    return DataConfig(source=(str(folder),), cache_dir=str(tmp_path / "cache"), val_fraction=0.2)


def damage_size(folder):
    with (folder / "train-00000.bin").open("ab") as file:
        file.write(b"xx")


def damage_value(folder):
    ids = np.memmap(folder / "train-00000.bin", dtype="<u2", mode="r+")
    ids[len(ids) // 2] ^= 1
    ids.flush()


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


def damage_manifest_keys(folder):
    (folder / "manifest.json").write_text("{}")


def damage_missing(folder):
    (folder / "val-00000.bin").unlink()


def damage_index(folder):
    path = folder / "train-documents.bin"
    path.write_bytes(path.read_bytes()[::-1])


def damage_index_missing(folder):
    (folder / "documents.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_size,
        damage_value,
        damage_manifest,
        damage_manifest_keys,
        damage_missing,
        damage_index,
        damage_index_missing,
    ],
)
def test_damaged_cache_is_named(config, damage):
    prepare(config, BYTES, quiet)
    damage(folder_of(config))
    message = mistake(config)
    assert str(folder_of(config)) in message and "delete that folder" in message


def test_large_shards_are_hashed_by_sample_unless_asked(config, monkeypatch):
    (Path(config.source[0]) / "00.txt").write_text("x" * 3_000_000)
    prepare(config, BYTES, quiet)
    folder = folder_of(config)
    monkeypatch.setattr(shard_file, "WHOLE_HASH_BYTES", 0)
    ids = np.memmap(folder / "train-00000.bin", dtype="<u2", mode="r+")
    step = (2 * len(ids) - 4096) // 255 // 2
    assert step > 2048 + 100, "the place below must lie between two blocks"
    ids[2048 + 50] ^= 1
    ids.flush()
    prepare(config, BYTES, quiet)
    assert "another hash" in mistake(config, verify=True)
    ids[len(ids) // 2 :] = 0
    ids.flush()
    assert "another hash" in mistake(config)


def test_id_outside_the_vocabulary_is_never_handed_out(config):
    data = prepare(config, BYTES, quiet)
    ids = np.memmap(folder_of(config) / "train-00000.bin", dtype="<u2", mode="r+")
    ids[5] = 300
    ids.flush()
    with pytest.raises(UsageError, match="token id 300, vocabulary 257.*delete that folder"):
        data.sources[0].train.read(0, np.empty(10, dtype=np.int64))


# ---- disks and processes ----


@pytest.mark.parametrize(
    "number, said",
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "cannot write"),
        (errno.EACCES, "cannot write"),
    ],
)
def test_full_or_read_only_disk(config, monkeypatch, number, said):
    def refuse(_handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    message = mistake(config)
    assert said in message and config.cache_dir in message and "data.cache_dir" in message
    assert [path for path in Path(config.cache_dir).iterdir() if path.name[0] != "."] == []
    monkeypatch.undo()
    assert prepare(config, BYTES, quiet).train_tokens > 0


def test_cache_in_an_impossible_place(config, tmp_path):
    (tmp_path / "file").write_text("x")
    message = mistake(replace(config, cache_dir=str(tmp_path / "file" / "cache")))
    assert "cannot write tokenised data" in message


def test_finished_cache_is_read_from_a_read_only_disk(config, monkeypatch):
    first = prepare(config, BYTES, quiet)
    for name in ("mkdir", "chmod"):
        monkeypatch.setattr(Path, name, None)
    assert prepare(config, BYTES, quiet).fingerprint == first.fingerprint


def test_a_damaged_file_of_rows_is_counted_and_named_once(tmp_path):
    """Every unit that reads it meets the damage."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = "".join(
        json.dumps({"text": f"{i} " + os.urandom(400).hex()}) + "\n" for i in range(6000)
    )
    packed = gzip.compress(lines.encode())
    (folder / "broken.jsonl.gz").write_bytes(packed[: len(packed) * 9 // 10])
    (folder / "whole.jsonl").write_text(
        lines[: lines.index("\n", 100_000) + 1] + '{"text": null}\n'
    )
    data = DataConfig(
        source=(str(folder),), cache_dir=str(tmp_path / "cache"), val_fraction=0.2, skip_bad=True
    )
    lines = []
    prepare(data, BYTES, lines.append)
    skipped = [line for line in lines if line.startswith("skipped: ")]
    assert len(skipped) == 2 and sum("broken.jsonl.gz" in line for line in skipped) == 1
    manifest = json.loads((folder_of(data) / "manifest.json").read_text())
    assert manifest["skipped"] == 2


def test_a_source_that_repeats_another_names_dedup(tmp_path):
    for name in ("x", "y"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"text {i} " * 20}) + "\n" for i in range(40))
        )
    data = DataConfig(
        source=(str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")),
        cache_dir=str(tmp_path / "cache"),
        seq_len=64,
        dedup="exact",
        val_fraction=0.2,
    )
    with pytest.raises(
        UsageError, match=r"leave out that source or data\.dedup=exact, or give more"
    ):
        Stream(prepare(data, BYTES, quiet), data, seed=0)
