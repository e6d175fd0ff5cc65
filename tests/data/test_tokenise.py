"""The same shards from any number of processes, whatever becomes of them."""

import gzip
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headway.config import DataConfig, UsageError
from headway.data import parts, tokenise, units, workers
from headway.data.document import split
from headway.data.shards import prepare
from headway.data.tokenizer import JsonTokenizer, load_tokenizer, train_bpe

BYTES = load_tokenizer("bytes")


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", (1 << 20, 1 << 20))


def rows_of(n, seed):
    draw = random.Random(seed)
    return [
        "".join(draw.choices(["a", "ü", "日本", "𝄞", "\n", " "], k=draw.randrange(3000)))
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 9 MB of every kind that is cut, in the order of names, and its documents."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = {"a": rows_of(400, 1), "b": rows_of(300, 2)}
    lines = {
        name: "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in some)
        for name, some in rows.items()
    }
    (folder / "a.jsonl").write_text(lines["a"])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines["b"].encode(), 1))
    documents = [text for some in rows.values() for text in some if text]
    # lines longer than a block, blocks that end within a character, no newline at the end
    long = "日" * 400_000 + "\n" + "short\n" * 50_000 + "é" * 600_000 + "\nü" + "x" * 1_500_000
    (folder / "c.txt").write_text(long)
    (folder / "d.txt.gz").write_bytes(gzip.compress(long.encode(), 1))
    (folder / "e.csv").write_text('id,text\n1,"one, ""two""\n3"\n2,\n3,four\n')
    for i in range(50):
        (folder / f"f{i:02d}.py").write_text(f"x = {i}\n" * i)
    documents += [long, long, 'one, "two"\n3', "four", *(f"x = {i}\n" * i for i in range(1, 50))]
    return folder, documents


def config_of(folder, tmp_path, **options):
    return DataConfig(source=(str(folder),), cache_dir=str(tmp_path), val_fraction=0.1, **options)


def shards_of(config, tokenizer=BYTES, log=lambda line: None):
    """{file: sha256} of the only folder in the cache."""
    data = prepare(config, tokenizer, log, verify=True)
    (folder,) = (path for path in Path(config.cache_dir).iterdir() if path.name[0] != ".")
    assert not list(Path(config.cache_dir).glob(".*.parts"))
    return data, {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
    }


def test_shards_hold_every_document_in_order_for_any_number_of_workers(corpus, tmp_path):
    folder, documents = corpus
    data, one = shards_of(config_of(folder, tmp_path / "1", workers=1))
    for name in ("train", "val"):
        tokens = getattr(data.sources[0], name)
        wanted = [text.encode() for part, text in split(documents, 0.1) if part == name]
        ids = np.empty(len(tokens), dtype=np.int64)
        tokens.read(0, ids)
        assert (
            np.flatnonzero(ids == 256).tolist()
            == (np.cumsum([len(text) + 1 for text in wanted]) - 1).tolist()
        )
        assert ids[ids != 256].astype(np.uint8).tobytes() == b"".join(wanted)
        assert (tokens.documents, tokens.text_bytes) == (len(wanted), sum(map(len, wanted)))
    assert len(units.plan(str(folder), 0.1)[0]) > 6
    lines = []
    _, three = shards_of(config_of(folder, tmp_path / "3", workers=3), log=lines.append)
    assert three == one and "by 3 processes" in lines[0]


def test_workers_take_any_tokenizer_file(corpus, tmp_path):
    """A tokenizer loses nothing on its way to another process: special tokens stay text."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text("see <|endoftext|> here\n" * 15_000 + "\n" * 700_000)
    bpe = train_bpe(["see here <|endoftext|>"] * 9, 300, tmp_path / "bpe.json")
    copy = pickle.loads(pickle.dumps(bpe))
    assert isinstance(copy, JsonTokenizer) and copy.fingerprint == bpe.fingerprint
    made = [shards_of(config_of(folder, tmp_path / str(n), workers=n), bpe)[1] for n in (1, 2)]
    assert made[0] == made[1]
    assert bpe.eos not in copy.encode("see <|endoftext|> here")


COMMAND = """
import sys
from headway.config import DataConfig
from headway.data import parts, units
from headway.data.shards import prepare
from headway.data.tokenizer import load_tokenizer
units.UNIT_BYTES = (1 << 20, 1 << 20)
config = DataConfig(source=(sys.argv[1],), cache_dir=sys.argv[2], val_fraction=0.1, workers=int(sys.argv[3]))
prepare(config, load_tokenizer("bytes"), lambda line: print(line, flush=True))
"""


def process(folder, cache, n):
    place = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", COMMAND, str(folder), str(cache), str(n)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=place
    )


def test_several_processes_share_a_source(corpus, tmp_path):
    folder, _ = corpus
    _, wanted = shards_of(config_of(folder, tmp_path / "alone"))
    running = [process(folder, tmp_path / "shared", n) for n in (1, 2)]
    said = [one.communicate(timeout=120)[0] for one in running]
    assert [one.returncode for one in running] == [0, 0]
    assert sum("tokenised " in text for text in said) == 1  # one has joined the parts
    lines = []
    assert shards_of(config_of(folder, tmp_path / "shared"), log=lines.append)[1] == wanted
    assert len(lines) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_process_leaves_no_worker_and_its_parts_are_used(
    corpus, tmp_path, monkeypatch, number
):
    folder, _ = corpus
    _, wanted = shards_of(config_of(folder, tmp_path / "alone"))
    cache = tmp_path / "killed"
    running = process(folder, cache, 2)
    end = time.monotonic() + 60
    done = []
    while time.monotonic() < end and len(done) < 2:
        done = [path for path in cache.glob(".*.parts/*.npz") if path.stem.isdigit()]
        time.sleep(0.005)
    running.send_signal(number)
    running.communicate(timeout=60)  # to the end of stderr, which the workers hold too
    assert running.returncode == -number and len(done) >= 2
    (made,) = cache.glob(".*.parts")
    (made / ".unfinished").write_bytes(b"what a killed process was at")
    tokenised = []
    real = parts._tokenise
    monkeypatch.setattr(
        parts, "_tokenise", lambda job, unit, tell: (tokenised.append(unit), real(job, unit, tell))
    )
    n_units = len(units.plan(str(folder), 0.1)[0])
    lines = []
    assert shards_of(config_of(folder, cache, workers=1), log=lines.append)[1] == wanted
    assert len(tokenised) <= n_units - len(done) and "going on at" in lines[0]


def test_interrupt_ends_the_workers(corpus, tmp_path, monkeypatch):
    started = []
    real = workers._started
    monkeypatch.setattr(
        workers, "_started", lambda *args: started.append(real(*args)) or started[-1]
    )

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenise._Progress, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config_of(corpus[0], tmp_path, workers=2), BYTES)
    assert len(started) == 2
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no child is left


def test_killed_worker_is_one_line_and_its_parts_stay(corpus, tmp_path, monkeypatch):
    real = subprocess.Popen

    def dies(*args, **options):
        child = real(*args, **options)
        os.kill(child.pid, signal.SIGKILL)
        return child

    monkeypatch.setattr(workers.subprocess, "Popen", dies)
    with pytest.raises(UsageError, match="ended by signal 9; if memory is short, set data.workers"):
        prepare(config_of(corpus[0], tmp_path, workers=2), BYTES, lambda line: None)


def test_error_in_a_worker_is_the_users_line(corpus, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_bytes(b"text " * 300_000 + b"\xff" * (i == 2))
    config = config_of(folder, tmp_path / "cache", workers=2)
    with pytest.raises(UsageError, match=r"2.txt is not UTF-8 text \(byte 0xff at 1,500,000\)"):
        prepare(config, BYTES, lambda line: None)
    assert not list((tmp_path / "cache").glob("*parts*"))
    data = prepare(replace(config, skip_bad=True), BYTES, lambda line: None)
    assert (data.sources[0].train.documents, data.sources[0].val.documents) == (1, 1)
    assert data.train_tokens == data.val_tokens == 1_500_001  # nothing of what could be read of it


def test_no_locks_and_two_at_once_give_the_same_shards(corpus, tmp_path, monkeypatch):
    def no_lock(_file, _how):
        raise OSError(37, "no locks")

    _, wanted = shards_of(config_of(corpus[0], tmp_path / "alone"))
    monkeypatch.setattr(parts.fcntl, "flock", no_lock)
    config = config_of(corpus[0], tmp_path / "two", workers=1)
    real, nested = parts._tokenise, []

    def slow(job, unit, tell):
        if not nested:
            nested.append(unit)
            prepare(config, BYTES, lambda line: None)  # somebody else is faster, at the same unit
        real(job, unit, tell)

    monkeypatch.setattr(parts, "_tokenise", slow)
    assert shards_of(config)[1] == wanted
