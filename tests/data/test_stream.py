import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import DataConfig, UsageError
from headway.data import shard_file
from headway.data.document_index import DocumentIndex, SplitIndex
from headway.data.overlap import Overlap
from headway.data.shard_file import Tokens
from headway.data.shards import Dataset, Source, prepare
from headway.data.stream import Stream, _taken, _thresholds, pick
from headway.data.text_windows import TextWindows
from headway.data.tokenizer import load_tokenizer
from headway.data.validation import validation_text

BYTES = load_tokenizer("bytes")


def u64(values):
    return np.array(values, dtype=np.uint64)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    sources = []
    for name, size, letters in (("a", 40, "abcd"), ("b", 25, "wxyz"), ("c", 10, "0123")):
        folder = root / name
        folder.mkdir()
        for i in range(size):
            (folder / f"{i:02d}.txt").write_text("".join(rng.choice(list(letters), 20 + 3 * i)))
        sources.append(str(folder))
    return DataConfig(
        source=tuple(sources),
        cache_dir=str(root / "cache"),
        val_fraction=0.1,
        seq_len=16,
        batch_size=8,
        doc_mask=True,
    )


@pytest.fixture(scope="module")
def data(config):
    return prepare(config, BYTES, lambda _: None)


def equal(a, b):
    pairs = zip((a.tokens_BS, a.targets_BS), (b.tokens_BS, b.targets_BS), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def locate(stream, samples):
    """The source and the first token of samples."""
    source, number = stream.locate(samples)
    start = np.empty(len(samples), dtype=np.int64)
    for s, windows in enumerate(stream.windows):
        assert isinstance(windows, TextWindows)
        start[source == s] = windows.starts(number[source == s])
    return source, start


# ---- how samples are shared among sources ----


@given(st.integers(0, 2**63 - 1), st.integers(1, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_counting_is_exact_for_any_size(g, share, phase):
    assert int(_taken(u64([g]), share, phase)[0]) == (g * share + phase) >> 32


@settings(deadline=None, max_examples=100)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 2**50),
)
def test_mixing_counts_and_proportions(weights, seed, start):
    n = 500
    phases = [(seed * (k + 7)) % 2**32 for k in range(len(weights))]
    splits = _thresholds(tuple(weights))
    source, count = pick(np.arange(start, start + n, dtype=np.uint64), splits, phases)
    for s, weight in enumerate(weights):
        mine = count[source == s].astype(np.int64)
        # The counter of each source goes up by one each time, with no gap.
        assert np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)) if len(mine) else mine)
        # Every level of the nest is right to within one; a level adds the error of those before.
        assert abs(len(mine) - n * weight / sum(weights)) <= len(weights) + 1
    if start == 0:
        for s in set(source.tolist()):
            assert count[source == s][0] == 0


def test_count_is_the_number_of_earlier_samples_of_the_source():
    splits, phases = _thresholds((5.0, 1.0, 3.0, 0.5)), [123, 2**31, 2**32 - 1]
    source, count = pick(np.arange(3000, dtype=np.uint64), splits, phases)
    seen = [0] * 4
    for s, c in zip(source, count, strict=True):
        assert c == seen[s]
        seen[s] += 1


# ---- batches ----


def test_shapes_and_targets(config, data):
    batch = Stream(data, config, 0).batch(5)
    assert batch.tokens_BS.shape == batch.targets_BS.shape == (8, 16)
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == torch.int64
    assert torch.equal(batch.tokens_BS[:, 1:], batch.targets_BS[:, :-1])
    assert batch.targets_BS.min() >= 0 and batch.targets_BS.max() <= 256
    assert batch.tokens_BS.is_contiguous() and batch.targets_BS.is_contiguous()


def test_doc_numbers(config, data):
    stream = Stream(data, config, 0)
    crossed = 0
    for step in range(20):
        batch = stream.batch(step)
        doc_BS = batch.doc_BS
        assert doc_BS is not None and doc_BS.dtype == torch.int32
        for tokens, docs in zip(batch.tokens_BS.tolist(), doc_BS.tolist(), strict=True):
            number = 0
            for token, doc in zip(tokens, docs, strict=True):
                assert doc == number
                number += token == 256
            crossed += number
    assert crossed > 10
    assert Stream(data, replace(config, doc_mask=False), 0).batch(0).doc_BS is None


def test_windows_are_text_of_the_ring_of_tokens(config, data):
    stream = Stream(data, config, 3)
    for step in (0, 100):
        samples = np.arange(step * 8, step * 8 + 8, dtype=np.uint64)
        batch = stream.batch(step)
        for row, (s, start) in enumerate(zip(*locate(stream, samples), strict=True)):
            tokens = data.sources[s].train
            ids = np.empty(len(tokens), dtype=np.int64)
            tokens.read(0, ids)
            wanted = np.take(ids, np.arange(start, start + 17), mode="wrap")
            assert batch.tokens_BS[row].tolist() == wanted[:-1].tolist()
            assert batch.targets_BS[row].tolist() == wanted[1:].tolist()


@pytest.mark.parametrize("seed", [0, 1, -5, 2**70])
def test_an_epoch_visits_every_window_once(config, data, seed):
    one = replace(config, source=config.source[:1])
    single = replace(data, sources=data.sources[:1])
    stream = Stream(single, one, seed)
    length = len(single.sources[0].train)
    windows = length // 16
    offsets, orders = set(), set()
    for epoch in range(4):
        samples = np.arange(epoch * windows, (epoch + 1) * windows, dtype=np.uint64)
        _, start = locate(stream, samples)
        tokens_seen = np.bincount(
            (start[:, None] + np.arange(16)).reshape(-1) % length, minlength=length
        )
        assert tokens_seen.max() == 1 and tokens_seen.sum() == windows * 16
        offsets.add(tuple(sorted(start)))
        orders.add(tuple(start))
    assert len(offsets) == len(orders) == 4


@settings(deadline=None, max_examples=60)
@given(step=st.integers(0, 10**9), seed=st.integers(0, 2**63))
def test_union_over_ranks_does_not_depend_on_the_world(config, data, step, seed):
    stream = Stream(data, config, seed)
    whole = stream.batch(step)
    for world in (2, 4, 8):
        parts = [stream.batch(step, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([part.tokens_BS for part in parts]), whole.tokens_BS)
        assert torch.equal(torch.cat([part.targets_BS for part in parts]), whole.targets_BS)
        docs = [part.doc_BS for part in parts if part.doc_BS is not None]
        assert whole.doc_BS is not None and torch.equal(torch.cat(docs), whole.doc_BS)


def token_hash(data, config, steps, world=1):
    stream = Stream(data, config, 0)
    digest = hashlib.sha256()
    for step in steps:
        for rank in range(world):
            digest.update(stream.batch(step, rank, world).tokens_BS.numpy().tobytes())
    return digest


def test_interrupt_at_k_and_resume_twice(config, data):
    straight = token_hash(data, config, range(30)).hexdigest()
    again = prepare(config, BYTES, lambda _: None)  # another process would map the files anew
    first = token_hash(data, config, range(0, 11))
    stream_2 = Stream(again, config, 0)
    for step in range(11, 17):
        first.update(stream_2.batch(step).tokens_BS.numpy().tobytes())
    stream_3 = Stream(again, config, 0)
    for step in range(17, 30):
        for rank in range(2):  # and on another mesh
            first.update(stream_3.batch(step, rank, 2).tokens_BS.numpy().tobytes())
    assert first.hexdigest() == straight


def test_order_of_calls_does_not_matter(config, data):
    stream = Stream(data, config, 0)
    late = stream.batch(77)
    for step in (3, 500, 0):
        stream.batch(step)
    stream.val_windows(0, 2)
    assert equal(stream.batch(77), late)
    assert equal(Stream(data, config, 0).batch(77), late)
    assert not equal(Stream(data, config, 1).batch(77), late)


def test_fixed_samples(config, data):
    """The order of samples is part of what `resume` promises: a change here breaks every old
    run."""
    source, start = locate(Stream(data, config, 0), u64([0, 1, 2, 10, 1000, 10**12]))
    assert source.tolist() == [0, 1, 0, 0, 0, 0]
    assert start.tolist() == [2835, 1058, 233, 2403, 687, 2838]


def shares(stream, n=4000):
    source, _ = locate(stream, np.arange(n, dtype=np.uint64))
    return np.bincount(source, minlength=3) / n


def test_weights_are_reached(config, data):
    weighted = replace(config, weights=(1.0, 1.0, 6.0))
    assert np.abs(shares(Stream(data, weighted, 0)) - [1 / 8, 1 / 8, 6 / 8]).max() < 1e-3
    letters = Stream(data, weighted, 0).batch(0).tokens_BS[:, 0]
    assert len(set(letters.tolist())) > 1
    huge = replace(config, weights=(1e308, 1e308, 1e308))
    assert np.abs(shares(Stream(data, huge, 0)) - 1 / 3).max() < 1e-3


def test_without_weights_tokens_decide(config, data):
    tokens = np.array([len(source.train) for source in data.sources])
    assert np.abs(shares(Stream(data, config, 0)) - tokens / tokens.sum()).max() < 1e-3


def test_the_default_corpus_end_to_end(tmp_path):
    config = DataConfig(cache_dir=str(tmp_path))
    stream = Stream(prepare(config, BYTES, lambda _: None), config, 0)
    tokens = stream.batch(0).tokens_BS
    assert tokens.shape == (8, 256) and stream.batch(0).doc_BS is None
    # Python code: mostly ASCII, about a quarter white space.
    assert (tokens < 128).double().mean() > 0.98
    assert 0.1 < (tokens == ord(" ")).double().mean() < 0.6
    assert 0.02 < stream.dataset.val_tokens / stream.dataset.train_tokens < 0.1


# ---- validation ----


def test_each_validation_token_is_a_target_once_in_the_same_order_for_all(config, data):
    other = replace(config, weights=(9.0, 1.0, 1.0), batch_size=3)
    streams = [Stream(data, config, 0), Stream(data, other, 5)]
    total = sum(-(-len(source.val) // 16) for source in data.sources)
    assert [stream.n_val_windows for stream in streams] == [total] * 2
    whole = streams[0].val_windows(0, total)
    pieces = [streams[1].val_windows(i, min(i + 7, total)) for i in range(0, total, 7)]
    assert torch.equal(torch.cat([piece.tokens_BS for piece in pieces]), whole.tokens_BS)
    assert torch.equal(torch.cat([piece.targets_BS for piece in pieces]), whole.targets_BS)
    wanted = []
    for source in data.sources:
        ids = np.empty(len(source.val), dtype=np.int64)
        source.val.read(0, ids)
        before = np.append(256, ids[:-1])  # the first token follows an eos, as all documents do
        for i in range(0, len(ids), 16):
            wanted.append((before[i : i + 16].tolist(), ids[i : i + 16].tolist()))
    assert whole.bytes_B is not None
    seen = []
    rows = zip(whole.tokens_BS.tolist(), whole.targets_BS.tolist(), whole.bytes_B, strict=True)
    for tokens, targets, n_bytes in rows:
        n = sum(target >= 0 for target in targets)
        assert targets[n:] == [-1] * (16 - n)
        assert n_bytes == sum(target < 256 for target in targets[:n])
        seen.append((tokens[:n], targets[:n]))
    assert sorted(seen) == sorted(wanted) and seen != wanted


def test_validation_documents_are_numbered_over_all_sources(config, data):
    stream = Stream(data, config, 0)
    whole = stream.val_windows(0, stream.n_val_windows)
    targets_of = np.bincount(whole.document_BS[whole.targets_BS >= 0].numpy())
    lengths = []
    for source in data.sources:
        end_N = source.index.documents(source.index.val)["end"].astype(np.int64)
        lengths += np.diff(end_N, prepend=0).tolist()
    assert targets_of.tolist() == lengths and len(lengths) == len(stream.val_documents)


def test_validation_text_is_known_by_its_content(config, data):
    def made(tokens, data=data, **change):
        changed = replace(config, **change)
        return validation_text(Stream(data, changed, 0), tokens)

    some = made(100)
    assert some.windows == 7 and some.sentence.startswith("7 of ")
    total = Stream(data, config, 0).n_val_windows
    assert f" of {total} windows of 16 tokens (bytes) of /" in some.sentence
    assert made(97, batch_size=2) == made(112, weights=(1.0, 2.0, 3.0), doc_mask=True) == some
    whole = made(0)
    assert whole == made(10**9) and whole.windows == total
    assert whole.sentence.startswith(f"all {total} windows of 16 tokens")
    assert made(0, seq_len=8).fingerprint == whole.fingerprint
    fewer = replace(data, sources=data.sources[:2])
    prints = {
        whole.fingerprint,
        some.fingerprint,
        made(90).fingerprint,
        made(112, seq_len=8).fingerprint,
        made(0, fewer, source=config.source[:2]).fingerprint,
    }
    assert len(prints) == 5


# ---- mistakes ----


def mistake(call, *args):
    with pytest.raises(UsageError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_world_must_divide_the_batch(config, data):
    message = mistake(Stream(data, config, 0).batch, 0, 0, 3)
    assert "3 ranks" in message and "batch_size=8" in message and "9" in message


def test_data_shorter_than_a_batch(config, data):
    had = data.train_tokens
    message = mistake(Stream, data, replace(config, batch_size=1000), 0)
    assert f"{had:,} training tokens" in message and "16,001" in message


def test_split_shorter_than_a_window(config, tmp_path):
    def made(size, **change):
        (tmp_path / "t.txt").write_text("x" * size)
        short = replace(config, source=(str(tmp_path / "t.txt"),), **change)
        return mistake(Stream, prepare(short, BYTES, lambda _: None), short, 0)

    message = made(100)
    assert "has 11 validation tokens, one window needs 17" in message and "val_fraction" in message
    assert "has 11 training tokens, one window needs 17" in made(20, val_fraction=0.5)


def test_bad_weights(config, data):
    assert "2 weights for 3 sources" in mistake(
        Stream, data, replace(config, weights=(1.0, 2.0)), 0
    )


def test_more_tokens_than_31_bits_hold(tmp_path):
    """In a sparse shard places beyond 2³¹ are read, drawn as samples, and wrapped around."""
    n, dtype = (1 << 31) + (1 << 20), np.dtype("<u2")
    path = tmp_path / "train-00000.bin"
    with path.open("wb") as file:
        file.seek(2 * n - 2000)
        file.write(np.full(1000, 7, dtype).tobytes())
    shard = {"file": path.name, "tokens": n, "documents": 1, "bytes": 2 * n, "sha256": ""}
    shard["sample"] = shard_file.sample_digest(path)
    split = {"tokens": n, "documents": 1, "text_bytes": n, "shards": [shard]}
    train = Tokens(tmp_path, split, dtype, np.ones(257, np.int64), verify=False)
    out = np.empty(1004, dtype=np.int64)
    train.read(n - 1002, out)
    assert out.tolist() == [0, 0, *[7] * 1000, 0, 0]
    nothing = SplitIndex("", 0, 0, "", "", 0, "")
    index = DocumentIndex(tmp_path, nothing, nothing, 0)
    source = Source("x", tmp_path, train, train, index, "")
    config = DataConfig(source=("x",), seq_len=7, batch_size=3)
    stream = Stream(Dataset((source,), 257, 256, "", Overlap(1, 0)), config, seed=0)
    sample = np.arange(3000, dtype=np.uint64) + np.uint64(n // 7 - 1000)
    _, start = locate(stream, sample)  # over the end of an epoch
    assert start.min() >= 0 and start.max() < n and (start > 1 << 31).any()
    assert len({*start.tolist()}) > 2990
    assert stream.batch(10**9).tokens_BS.shape == (3, 7)
    assert stream.n_val_windows == -(-n // 7)
    assert stream.val_windows(stream.n_val_windows - 2, stream.n_val_windows).tokens_BS.shape == (
        2,
        7,
    )
