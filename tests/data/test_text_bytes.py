"""Bytes per token against the bytes of the text, counted by hand, for tokenizers that change it."""

import json
import math
import unicodedata

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers

from headway.config import DataConfig, ModelConfig, MoEConfig
from headway.data.document import Text, split
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.data.validation import validation_text
from headway.eval.bits_per_byte import evaluate
from headway.model.compute import Compute
from headway.model.transformer import Transformer

NFD = [unicodedata.normalize("NFD", f"äöü é {i}") for i in range(24)]
TEXTS = {
    "accents": NFD,
    "one character": [*"aébc漢\ufffd" * 6],
    "replacement": [f"\ufffd{i}\ufffd" for i in range(20)],
    "plain": [f"plain text {i}" for i in range(20)],
}


def byte_level(normalizer=None, prefix=False):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def words(vocabulary, unknown):
    """No fallback to bytes: what is not in the vocabulary is one unknown token."""
    names = [unknown, *vocabulary]
    model = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=unknown)
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([unknown])
    return inner


TOKENIZERS = {
    "byte level": lambda: byte_level(),
    "NFC": lambda: byte_level(normalizers.NFC()),
    "prefix space": lambda: byte_level(prefix=True),
    "words": lambda: words(["plain", "text", "a"], "<unk>"),
    "only unknown": lambda: words([], "<unk>"),
}
EXACT = {("byte level", name) for name in TEXTS} | {
    ("NFC", name) for name in TEXTS if name != "accents"
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("text-bytes")
    for name, make in TOKENIZERS.items():
        inner = make()
        inner.add_special_tokens(["<|endoftext|>"])
        inner.save(str(root / f"{name}.json"))
    for name, documents in TEXTS.items():
        lines = [json.dumps({"text": text}) for text in documents]
        (root / f"{name}.jsonl").write_text("\n".join(lines))

    def prepared(tokenizer, *names):
        config = DataConfig(
            source=tuple(str(root / f"{name}.jsonl") for name in names),
            tokenizer=str(root / f"{tokenizer}.json"),
            cache_dir=str(root / "cache"),
            val_fraction=0.25,
            seq_len=5,
            batch_size=1,
        )
        loaded = load_tokenizer(config.tokenizer)
        return Stream(prepare(config, loaded, lambda _: None), config, 0), loaded

    return prepared


def by_hand(name):
    """Bytes of the validation documents, and of the training documents."""
    found = {"train": 0, "val": 0}
    for part, document in split((Text("", text) for text in TEXTS[name]), 0.25):
        assert isinstance(document, Text)
        found[part] += len(document.text.encode())
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokens_share_the_bytes_of_the_text(made, tokenizer, text):
    stream, loaded = made(tokenizer, text)
    wanted = by_hand(text)
    whole = stream.val_windows(0, stream.n_val_windows)
    assert whole.bytes_B is not None
    assert float(whole.bytes_B.sum()) == pytest.approx(wanted["val"], rel=1e-12)
    (source,) = stream.dataset.sources
    ids = np.empty(len(source.train), dtype=np.int64)
    source.train.read(0, ids)
    assert source.train.bytes_V[ids].sum() == pytest.approx(wanted["train"], rel=1e-12)
    assert source.train.bytes_V[loaded.eos] == 0
    exact = (tokenizer, text) in EXACT
    assert np.array_equal(source.train.bytes_V, loaded.token_bytes) == exact
    notes = stream.dataset.approximate
    assert len(notes) == (not exact)
    if notes:
        assert f"{sum(wanted.values()):,} bytes of text are " in notes[0]


def test_each_source_has_its_own_share(made):
    stream, _ = made("NFC", "accents", "plain")
    whole = stream.val_windows(0, stream.n_val_windows)
    assert whole.bytes_B is not None
    both = by_hand("accents")["val"] + by_hand("plain")["val"]
    assert float(whole.bytes_B.sum()) == pytest.approx(both, rel=1e-12)
    plain = stream.dataset.sources[1]
    assert set(plain.val.bytes_V.tolist()) <= {0.0, 1.0} and not plain.approximate
    assert len(stream.dataset.approximate) == 1


def test_bits_per_byte_are_divided_by_the_bytes_of_the_text(made):
    stream, _ = made("NFC", "accents")
    moe = MoEConfig(n_experts=2, top_k=2, d_expert=8)
    config = ModelConfig(vocab_size=257, n_layers=1, d_model=16, n_heads=2, moe=moe)
    model = Transformer(config, Compute(dtype=torch.float64), seed=0).double()
    found = evaluate(model, stream, validation_text(stream, 0).windows, 4)
    nats = found.val_loss * len(stream.dataset.sources[0].val)
    bits = nats / math.log(2) / by_hand("accents")["val"]
    assert found.val_bits_per_byte == pytest.approx(bits, rel=1e-12)


def test_whole_split_is_the_same_text_for_tokenizers_that_keep_it(made):
    prints = {
        name: validation_text(made(name, "plain")[0], 0).fingerprint
        for name in ("byte level", "NFC", "prefix space", "words")
    }
    assert prints["byte level"] == prints["NFC"]
    assert len(set(prints.values())) == 3
