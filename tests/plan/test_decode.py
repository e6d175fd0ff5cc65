"""Bytes of a decoding step, against sums over the model's own tensors."""

import pytest
import torch

from headway.config import Config, ModelConfig, MoEConfig, UsageError
from headway.model.transformer import Transformer
from headway.plan.decode import decode_costs, read_bandwidth, touched

MOE = MoEConfig(n_heads=4, n_experts=8, top_k=2, d_expert=24, d_shared=32, n_dense_layers=1)
MODEL = ModelConfig(vocab_size=320, n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, moe=MOE)


def test_bytes_are_those_of_the_tensors():
    (row,) = decode_costs(Config(model=MODEL), [1], torch.bfloat16, 1e9, context=100)
    model = Transformer(MODEL, seed=0)
    wide = {"router.w_HEL", "norm1.weight", "norm2.weight", "norm.weight"}
    n_bytes = 64 * 2  # the row of one token
    for name, p in model.named_parameters():
        if name == "embed.weight":
            continue
        if "experts" in name:  # of each head, 2 of 8
            n_bytes += p.numel() * 2 * 2 / 8
        else:
            is_wide = (
                any(name.endswith(end) for end in wide) or "q_norm" in name or "k_norm" in name
            )
            n_bytes += p.numel() * (4 if is_wide else 2)
    assert row["weight_bytes"] == n_bytes
    assert row["experts_touched"] == 2 * 4 * 2 and row["experts"] == 2 * 4 * 8
    kv = 3 * 2 * (2 * 16) * 2
    assert row["kv_bytes_per_token"] == kv
    assert row["floor_seconds"] == pytest.approx((n_bytes + 100 * kv) / 1e9)


def test_weights_may_be_narrower_than_the_matmuls():
    config = Config(model=MODEL)
    (narrow,) = decode_costs(config, [3], torch.float32, 1e9, weights=torch.bfloat16)
    (half,) = decode_costs(config, [3], torch.bfloat16, 1e9)
    assert narrow["weight_bytes"] == half["weight_bytes"]
    assert narrow["kv_bytes_per_token"] == 2 * half["kv_bytes_per_token"]


def test_layers_with_windows_read_what_they_see():
    model = ModelConfig(vocab_size=320, n_layers=4, d_model=64, n_heads=4, window=(0, 24))
    (row,) = decode_costs(Config(model=model), [3], torch.float32, 1.0, context=100)
    (none,) = decode_costs(Config(model=model), [3], torch.float32, 1.0)
    layer = 2 * 64 * 4
    assert row["kv_bytes_per_token"] == 4 * layer
    read = row["floor_seconds"] - none["floor_seconds"]
    assert read == 3 * layer * (2 * 100 + 2 * 24)


def test_touched_is_the_mean_of_uniform_choices():
    layer = Transformer(MODEL, seed=0).sparse_layers()[0]
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(2000):
        chosen = torch.rand(5, 4, 8, generator=generator).topk(2).indices  # [B, H, K]
        counts.append(sum(len(set(chosen[:, h].flatten().tolist())) for h in range(4)))
    assert touched(layer, 5) == pytest.approx(sum(counts) / 2000, rel=0.01)


def test_counts_replace_the_formula():
    config = Config(model=MODEL)
    (few,), (many,) = (
        decode_costs(config, [16], torch.float32, 1e9, measured={16: n}) for n in (10, 20)
    )
    one = 4 * 3 * 24 * 16  # float32, SwiGLU, F, L
    assert many["weight_bytes"] - few["weight_bytes"] == 10 * one


def test_bandwidth_is_positive_and_threads_are_as_before():
    threads = torch.get_num_threads()
    assert read_bandwidth(8, 1) > 1e8
    assert torch.get_num_threads() == threads


def test_batches_below_one():
    with pytest.raises(UsageError, match="--batch 0 is below 1"):
        decode_costs(Config(model=MODEL), [4, 0], torch.float32, 1e9)
