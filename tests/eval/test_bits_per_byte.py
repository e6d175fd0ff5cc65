"""Bits per byte against plain logits, and its independence of micro-batches."""

import dataclasses
import math

import pytest
import torch

from headway.config import DataConfig, ModelConfig, MoEConfig
from headway.data.shards import prepare
from headway.data.stream import Batch, Stream
from headway.data.tokenizer import load_tokenizer
from headway.data.validation import validation_text
from headway.eval.bits_per_byte import bits_per_byte, count_targets, evaluate, micro_batches, share
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
    return Transformer(config, dtype=dtype, seed=0).to(dtype)


def test_equals_the_plain_sum(stream):
    subject = model()
    batch = stream.val_windows(0, 15)
    logits = subject(batch.tokens_BS).logits_BSV.detach().double()
    valid = batch.targets_BS >= 0
    chosen = logits.log_softmax(-1).gather(-1, batch.targets_BS.clamp(min=0).unsqueeze(-1))
    nats = -float(chosen.squeeze(-1)[valid].sum())
    n_bytes = int((batch.targets_BS[valid] < 256).sum())
    for micro in (15, 4, 1):
        found = evaluate(subject, stream, 15, micro)
        assert found.val_loss == pytest.approx(nats / int(valid.sum()), rel=1e-6)
        assert found.val_bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert subject.training
    assert evaluate(subject, stream, 5, 5) != found


def test_the_batch_size_does_not_choose_the_text(stream):
    subject = model(torch.float64)
    windows = validation_text(stream, 300).windows
    found = [
        evaluate(subject, Stream(stream.dataset, config, seed), windows, config.batch_size)
        for seed, config in enumerate(
            dataclasses.replace(stream.config, batch_size=size) for size in (1, 3, 8, 64)
        )
    ]
    for other in found[1:]:
        assert dataclasses.astuple(other) == pytest.approx(dataclasses.astuple(found[0]), rel=1e-12)


def test_only_valid_targets_count():
    targets = torch.tensor([[3, -1, 0], [1, 1, -1]])
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), targets, None, torch.tensor([5.0, 2.0]))
    assert count_targets(batch) == (4, 7)
    assert bits_per_byte(math.log(2) * 6, 3) == pytest.approx(2.0)
    assert math.isnan(bits_per_byte(1.0, 0))


def test_ranks_take_all_rows_once_and_as_many_each():
    tokens = torch.arange(15).view(5, 3)
    whole = Batch(tokens, tokens + 1, tokens.int(), torch.arange(5.0))
    parts = [share(whole, rank, 4) for rank in range(4)]
    assert [len(p.tokens_BS) for p in parts] == [2] * 4
    targets = torch.cat([p.targets_BS for p in parts])
    assert torch.equal(targets[:5], tokens + 1) and (targets[5:] == -1).all()
    assert sum(count_targets(p)[1] for p in parts) == 10


def test_micro_batches_are_the_rows_in_order():
    tokens = torch.arange(15).view(5, 3)
    batch = Batch(tokens, tokens + 1, tokens.int())
    parts = micro_batches(batch, 2, torch.device("cpu"))
    assert [len(p.tokens_BS) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p.targets_BS for p in parts]), tokens + 1)
    assert torch.equal(torch.cat([p.doc_BS for p in parts if p.doc_BS is not None]), tokens.int())
    plain = micro_batches(Batch(tokens, tokens, None), 5, torch.device("cpu"))
    assert len(plain) == 1 and plain[0].doc_BS is None
