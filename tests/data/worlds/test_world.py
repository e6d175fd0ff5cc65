"""What all worlds share: keys, splits, and items as a source of data."""

import hashlib
import subprocess
import sys
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.config import DataConfig, UsageError
from headway.data.counter_based import u64
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.data.worlds.draws import Draws, key_of
from headway.data.worlds.lines import lines
from headway.data.worlds.source import WorldSource
from headway.data.worlds.spec import parse_world
from headway.data.worlds.world import generate, is_in
from tests.data.worlds.rows import rows

SMALL = (
    "mqar,pairs=2,length=12,vocab=16",
    "s3,length=5",
    "a5,length=4,bos=0",
    "parity,length=9",
    "copy,length=8",
    "facts,length=2,agents=3,objects=2,values=2,kind=holder,weights=recall",
    "multiplication,length=1,n=2",
    "sums,length=2,language=1,languages=2",
)
"""A small item of each world."""


def stream(*sources, seed=0, **changes):
    config = DataConfig(source=sources, **{"seq_len": 32, "batch_size": 8, **changes})
    tokenizer = load_tokenizer(config.vocabulary)
    return Stream(prepare(config, tokenizer), config, seed)


@pytest.mark.parametrize("spec", SMALL)
def test_splits_are_disjoint_whatever_the_seed(spec):
    world = parse_world(spec)
    contents = {
        split: {
            int(h)
            for seed in (0, 9)
            for h in world.content(generate(world, split, np.arange(1500, dtype=np.uint64), seed))
        }
        for split in ("train", "val", "test")
    }
    assert all(len(c) > 3 for c in contents.values())
    assert not contents["train"] & contents["val"]
    assert not contents["train"] & contents["test"]
    assert not contents["val"] & contents["test"]
    texts = [{row["prompt"] for row in rows(world, s, 400)} for s in ("train", "val", "test")]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_each_content_is_in_one_split(contents):
    hashes = np.array(contents, dtype=np.uint64)
    assert (sum(is_in(split, hashes).astype(int) for split in ("train", "val", "test")) == 1).all()


@pytest.mark.parametrize("spec", SMALL)
def test_an_item_is_the_same_alone_and_among_others(spec):
    world = parse_world(spec)
    together = generate(world, "test", np.arange(3, 50, dtype=np.uint64), seed=4)
    alone = generate(world, "test", np.array([20], dtype=np.uint64), seed=4)
    for name, values in together.items():
        assert np.array_equal(values[17], alone[name][0])
    other = generate(world, "test", np.arange(3, 50, dtype=np.uint64), seed=5)
    assert any(not np.array_equal(other[name], together[name]) for name in other)


def test_another_process_draws_the_same():
    code = (
        "import hashlib; from headway.data.worlds.spec import parse_world as p; "
        "from headway.data.worlds.lines import lines; "
        f"print([hashlib.sha256(''.join(lines(p(s), 'test', 40, 3)).encode()).hexdigest() "
        f"for s in {SMALL}])"
    )
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)}
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    here = ["".join(lines(parse_world(spec), "test", 40, 3)) for spec in SMALL]
    assert there.stdout.strip() == str([hashlib.sha256(t.encode()).hexdigest() for t in here])


@pytest.mark.parametrize("spec", SMALL)
def test_an_item_is_the_first_draw_that_falls_into_its_split(spec):
    """However many items are drawn together, and so however many draws of each are tried at once."""
    world, key = parse_world(spec), key_of(f"world|{parse_world(spec).name}|test|7")
    states = {n: generate(world, "test", np.arange(n, dtype=np.uint64), 7) for n in (3, 50, 600)}
    for item in range(3):
        for attempt in count():
            draws = Draws(key, u64(item), u64(attempt))
            if is_in("test", world.content(one := world.draw(draws)))[0]:
                break
        for state in states.values():
            assert all(np.array_equal(state[name][item], one[name][0]) for name in one)
    nothing = generate(world, "test", np.arange(0, dtype=np.uint64), 7)
    assert {k: (0, *v.shape[1:]) for k, v in states[3].items()} == {
        k: v.shape for k, v in nothing.items()
    }


def test_draws():
    draws = Draws(5, np.arange(20_000, dtype=np.uint64), u64(0))
    numbers = draws.integers(7, 3)
    assert numbers.shape == (20_000, 3) and set(numbers.ravel().tolist()) == set(range(7))
    assert np.abs(np.bincount(numbers[:, 1]) / 20_000 * 7 - 1).max() < 0.06
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 0.03
    uniform = draws.uniform(2)
    assert uniform.min() > 0 and uniform.max() <= 1 and abs(uniform.mean() - 0.5) < 0.01
    different = draws.distinct(5, 5)
    assert (np.sort(different, axis=1) == np.arange(5)).all()
    assert len(np.unique(different, axis=0)) == 120
    again = Draws(5, np.arange(9, dtype=np.uint64), u64(1))
    assert not np.array_equal(again.bits(), draws.bits()[:9])


@pytest.mark.parametrize("spec", SMALL)
def test_a_batch_holds_the_items_and_nothing_else_is_a_target(spec):
    s = stream(f"world:{spec}", seed=3)
    batch, tokenizer = s.batch(3), load_tokenizer(f"world:{spec}")
    items = rows(parse_world(spec), "train", 40, seed=3)[24:32]
    texts = zip(batch.tokens_BS, batch.targets_BS, items, strict=True)
    for tokens, targets, item in texts:
        n = len(item["tokens"])
        assert tokens.tolist() == item["tokens"] + [tokenizer.eos] * (32 - n)
        assert targets.tolist() == item["targets"] + [-1] * (32 - n)
        assert tokenizer.decode(tokens[: len(item["prompt"].split())].tolist()) == item["prompt"]
    words = parse_world(spec).words
    text_bytes = [sum(len(words[t]) for t in item["targets"] if t >= 0) for item in items]
    assert batch.bytes_B is not None and batch.bytes_B.tolist() == text_bytes


@pytest.mark.parametrize(
    ("vocabulary", "spec"),
    [
        ("world:parity", "world:copy"),  # lacks one word, the bar
        ("world:mqar,pairs=2,length=8,vocab=16", "world:mqar,pairs=2,length=8,vocab=18"),
        ("bytes", "world:parity"),
    ],
)
def test_a_tokenizer_must_have_every_word(vocabulary, spec):
    with pytest.raises(UsageError, match=f"the tokenizer lacks words of {spec}"):
        WorldSource.open(spec, load_tokenizer(vocabulary))


def test_a_batch_does_not_depend_on_ranks_and_cuts():
    two = ("world:mqar,pairs=2,length=12,vocab=16", "world:mqar,pairs=3,length=16,vocab=18")
    s = stream(*two, weights=(1.0, 3.0))
    whole = s.batch(5)
    parts = [s.batch(5, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part.targets_BS for part in parts]), whole.targets_BS)
    assert torch.equal(torch.cat([part.tokens_BS for part in parts]), whole.tokens_BS)
    n_targets = (whole.targets_BS >= 0).sum(1)
    assert sorted(n_targets.tolist()) == [2, 2, 3, 3, 3, 3, 3, 3]
    again = stream(*two, weights=(1.0, 3.0))  # as after a resume
    assert torch.equal(again.batch(5).tokens_BS, whole.tokens_BS)
    assert s.dataset.fingerprint == again.dataset.fingerprint
    other = stream(*two, weights=(1.0, 3.0), seed=1)
    assert not torch.equal(other.batch(5).tokens_BS, whole.tokens_BS)


def test_without_weights_worlds_share_evenly_however_long_their_items_are():
    s = stream("world:copy,length=3", "world:copy,length=12")
    n_targets = torch.cat([(s.batch(step).targets_BS >= 0).sum(1) for step in range(10)])
    assert n_targets.bincount()[[3, 12]].tolist() == [40, 40]


def test_validation_is_fixed_and_each_item_a_document():
    spec = "world:mqar,pairs=2,length=12,vocab=16"
    s = stream(spec)
    whole = s.val_windows(0, s.n_val_windows)
    assert torch.equal(
        stream(spec, seed=3, batch_size=2).val_windows(7, 9).tokens_BS, whole.tokens_BS[7:9]
    )
    asked = whole.targets_BS >= 0
    numbers = whole.document_BS[asked].unique()
    assert len(numbers) == len(s.val_documents) == s.n_val_windows == 512
    world = parse_world(spec)
    hashes = world.content(generate(world, "val", np.arange(512, dtype=np.uint64)))
    assert np.array_equal(s.val_documents, hashes)
    assert (whole.bytes_BS[~asked] == 0).all() and (whole.document_BS[~asked] == 0).all()


@pytest.mark.parametrize(
    ("sources", "changes", "words"),
    [
        (["world:mqar", "stdlib"], {}, "world:mqar has words of its own, and 'stdlib' is text"),
        (["world:mqar"], {"dedup": "exact"}, "data.dedup=exact is for .* its default, none"),
        (["world:mqar"], {"val_fraction": 0.1}, "data.val_fraction=0.1 is for text"),
        (["world:mqar"], {"near_duplicates": "cluster"}, "data.near_duplicates=cluster is for"),
        (["world:mqar"], {"tokenizer": "x.json"}, "data.tokenizer=x.json is for text"),
        (["world:mqar"], {}, "up to 64 tokens, and a window seq_len=32; use --data.seq-len 64"),
        (["world:mcar"], {}, "there is no world 'mcar'; use mqar, s5"),
        (["world:mqar,pair=2"], {}, "no option 'pair'; use pairs, length, vocab"),
        (["world:mqar,pairs=two"], {}, "a whole number for pairs, not 'two'"),
    ],
)
def test_mistakes(sources, changes, words):
    with pytest.raises(UsageError, match=words):
        stream(*sources, **changes)
