"""Bits per byte against plain logits, and its independence of micro-batches."""

import dataclasses
import math

import pytest
import torch

from headway.config import DataConfig, ModelConfig, MoEConfig
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.data.validation import validation_text
from headway.eval.bits_per_byte import bits_per_byte, evaluate
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
    for micro in (15, 4, 1):
        result = evaluate(subject, stream, 15, micro)
        assert result.val_loss == pytest.approx(nats / int(valid.sum()), rel=1e-6)
        assert result.val_bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
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
        assert dataclasses.astuple(other) == pytest.approx(
            dataclasses.astuple(results[0]), rel=1e-12
        )


def test_a_text_without_bytes_has_no_bits_per_byte():
    assert bits_per_byte(math.log(2) * 6, 3) == pytest.approx(2.0)
    assert math.isnan(bits_per_byte(1.0, 0))
