"""Bits per byte against plain logits, and its independence of micro-batches."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from headway.config import DataConfig, ModelConfig, MoEConfig
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.data.validation import validation_text
from headway.eval.bits_per_byte import DocumentLosses, bits_per_byte, evaluate
from headway.eval.copying import copied
from headway.model.compute import Compute
from headway.model.transformer import Transformer


@pytest.fixture
def stream(tmp_path):
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(6000)))
    config = DataConfig(
        source=(str(tmp_path / "text.txt"),),
        val_fraction=0.2,
        seq_len=32,
        batch_size=5,
        cache_dir=str(tmp_path / "cache"),
    )
    return Stream(prepare(config, load_tokenizer("bytes"), lambda _: None), config, seed=0)


def model(dtype=torch.float32):
    config = ModelConfig(
        vocab_size=257,
        n_layers=1,
        d_model=16,
        n_heads=2,
        moe=MoEConfig(n_experts=2, top_k=2, d_expert=8),
    )
    return Transformer(config, Compute(dtype=dtype), seed=0).to(dtype)


def test_equals_the_plain_sum(stream):
    subject = model()
    batch = stream.val_windows(0, 15)
    logits = subject(batch.tokens_BS).logits_BSV.detach().double()
    valid = batch.targets_BS >= 0
    chosen = logits.log_softmax(-1).gather(-1, batch.targets_BS.clamp(min=0).unsqueeze(-1))
    nats = -float(chosen.squeeze(-1)[valid].sum())
    n_bytes = int((batch.targets_BS[valid] < 256).sum())
    confidence, best = logits.softmax(-1).max(-1)
    right = (best == batch.targets_BS)[valid].double().numpy()
    confidence = confidence[valid].numpy()
    bins = np.digitize(confidence, np.arange(1, 10) / 10)
    error = sum(abs((confidence - right)[bins == b].sum()) for b in range(10)) / len(right)
    rest = valid & ~copied(batch.tokens_BS, batch.targets_BS)
    assert 50 < valid.sum() - rest.sum() < 150  # the text repeats itself
    uncopied = -float(chosen.squeeze(-1)[rest].sum()) / math.log(2)
    uncopied /= int((batch.targets_BS[rest] < 256).sum())
    for micro in (15, 4, 1):
        result = evaluate(subject, stream, 15, micro)
        assert result.val_loss == pytest.approx(nats / int(valid.sum()), rel=1e-6)
        assert result.val_bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
        assert result.documents is not None and result.calibration is not None
        assert result.calibration.error == pytest.approx(error, rel=1e-5)
        assert result.calibration.sums_3B[2].sum() == right.sum()
        assert result.documents.bits_per_byte_uncopied == pytest.approx(uncopied, rel=1e-6)
    assert subject.training
    assert evaluate(subject, stream, 5, 5) != result


def test_the_batch_size_does_not_choose_the_text(stream):
    subject = model(torch.float64)
    windows = validation_text(stream, 300).windows
    results = [
        evaluate(subject, Stream(stream.dataset, config, seed), windows, config.batch_size)
        for seed, config in enumerate(
            dataclasses.replace(stream.config, batch_size=size) for size in (1, 3, 8, 64)
        )
    ]
    for other in results[1:]:
        assert other.numbers() == pytest.approx(results[0].numbers(), rel=1e-12)


def test_documents_add_up_to_the_whole_and_are_those_of_the_files(tmp_path):
    """Each document alone, against logits of the windows it is read in."""
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(" ".join(str((i + 2) ** j) for j in range(4 + i)))
    config = DataConfig(
        (str(tmp_path / "*.txt"),), val_fraction=0.4, seq_len=16, cache_dir=str(tmp_path / "cache")
    )
    stream = Stream(prepare(config, load_tokenizer("bytes"), lambda _: None), config, seed=0)
    subject = model(torch.float64)
    result = evaluate(subject, stream, stream.n_val_windows, 7)
    documents = result.documents
    assert (
        documents is not None
        and 1 < len(documents.hash_N) == stream.dataset.sources[0].val.documents
    )
    whole = [documents.nats_N.sum(), documents.targets_N.sum(), documents.bytes_N.sum()]
    assert (
        whole[1] == stream.dataset.val_tokens
        and whole[2] == stream.dataset.sources[0].val.text_bytes
    )
    assert result.val_loss == pytest.approx(whole[0] / whole[1], rel=1e-12)
    assert result.val_bits_per_byte == documents.bits_per_byte
    ids = np.concatenate(stream.dataset.sources[0].val.parts).astype(np.int64)
    ends = stream.dataset.sources[0].index.documents(stream.dataset.sources[0].index.val)["end"]
    ring = torch.from_numpy(np.concatenate([ids[-1:], ids]))
    nats = torch.cat(
        [
            -subject(ring[None, at : at + 16])
            .logits_BSV.log_softmax(-1)[0]
            .gather(-1, ring[at + 1 : at + 17, None])
            .flatten()
            for at in range(0, len(ids), 16)
            if len(ring[at + 1 : at + 17]) == len(ring[at : at + 16])
        ]
    ).detach()
    starts = [0, *ends[:-1]]
    for i, (begin, end) in enumerate(zip(starts, ends, strict=True)):
        assert documents.targets_N[i] == end - begin
        assert documents.bytes_N[i] == end - begin - 1  # an eos stands for no text
        if end <= len(nats):
            assert documents.nats_N[i] == pytest.approx(float(nats[begin:end].sum()), rel=1e-10)
    path = tmp_path / "documents.npz"
    documents.save(path)
    again = DocumentLosses.load(path)
    assert all(np.array_equal(vars(again)[name], value) for name, value in vars(documents).items())


def test_a_text_without_bytes_has_no_bits_per_byte():
    assert bits_per_byte(math.log(2) * 6, 3) == pytest.approx(2.0)
    assert math.isnan(bits_per_byte(1.0, 0))
