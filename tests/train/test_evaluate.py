"""Bits per byte against plain logits, and its independence of micro-batches."""

import math

import numpy as np
import pytest
import torch

from headway.config import DataConfig, ModelConfig, MoEConfig
from headway.data.shards import prepare
from headway.data.stream import Batch, Stream
from headway.data.tokenizer import load_tokenizer
from headway.model.transformer import Transformer
from headway.train.evaluate import bits_per_byte, count_targets, evaluate, micro_batches


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


def test_equals_the_plain_sum(stream):
    config = ModelConfig(
        vocab_size=257,
        n_layers=1,
        d_model=16,
        n_heads=2,
        moe=MoEConfig(n_experts=2, top_k=2, d_expert=8),
    )
    model = Transformer(config, seed=0)
    token_bytes = torch.from_numpy(load_tokenizer("bytes").token_bytes)
    nats = targets = n_bytes = 0
    for i in range(3):
        batch = stream.val_batch(i)
        logits = model(batch.tokens_BS).logits_BSV.detach().double()
        chosen = logits.log_softmax(-1).gather(-1, batch.targets_BS.unsqueeze(-1))
        nats -= float(chosen.sum())
        targets += batch.targets_BS.numel()
        n_bytes += int((batch.targets_BS < 256).sum())
    for micro in (5, 2):
        found = evaluate(model, stream, token_bytes, 3, micro)
        assert found.val_loss == pytest.approx(nats / targets, rel=1e-6)
        assert found.val_bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert model.training
    everything = evaluate(model, stream, token_bytes, 0, 5)
    assert everything == evaluate(model, stream, token_bytes, 10**6, 5) != found


def test_only_valid_targets_count():
    targets = torch.tensor([[3, -1, 0], [1, 1, -1]])
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), targets, None)
    assert count_targets(batch, torch.from_numpy(np.array([5, 1, 9, 0]))) == (4, 7)
    assert bits_per_byte(math.log(2) * 6, 3) == pytest.approx(2.0)
    assert math.isnan(bits_per_byte(1.0, 0))


def test_micro_batches_are_the_rows_in_order():
    tokens = torch.arange(15).view(5, 3)
    batch = Batch(tokens, tokens + 1, tokens.int())
    parts = micro_batches(batch, 2, torch.device("cpu"))
    assert [len(p.tokens_BS) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p.targets_BS for p in parts]), tokens + 1)
    assert torch.equal(torch.cat([p.doc_BS for p in parts if p.doc_BS is not None]), tokens.int())
    plain = micro_batches(Batch(tokens, tokens, None), 5, torch.device("cpu"))
    assert len(plain) == 1 and plain[0].doc_BS is None
