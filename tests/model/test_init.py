import hashlib
import math
from dataclasses import replace

import pytest
import torch

from headway.config import ModelConfig, MoEConfig, RouterConfig
from headway.model.context import Context
from headway.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=512,
    n_layers=4,
    d_model=128,
    n_heads=2,
    d_ff=256,
    attn_gate=True,
    moe=MoEConfig(
        n_heads=2,
        n_experts=8,
        top_k=2,
        d_expert=64,
        n_dense_layers=1,
        latent_norm=True,
        d_shared=64,
        router=RouterConfig(noisy=True),
    ),
)


def test_every_weight_has_its_stated_scale():
    model = Transformer(SMALL, seed=0)
    depth = 1 / math.sqrt(8)
    want = {
        "embed.weight": 0.02,
        "head.weight": 0.1 / math.sqrt(128),
        "layers.0.ffn.w_in.weight": 1 / math.sqrt(128),
        "layers.0.ffn.w_out.weight": depth / math.sqrt(256),
        "layers.1.mixer.q.weight": 1 / math.sqrt(128),
        "layers.1.mixer.o.weight": depth / math.sqrt(128),
        "layers.1.ffn.w_in.weight": 1 / math.sqrt(128),
        "layers.1.ffn.w_out.weight": depth / math.sqrt(128),
        "layers.1.ffn.router.w_HEL": 1 / math.sqrt(64),
        "layers.1.ffn.experts.w_in_HEGFL": 1 / math.sqrt(64),
        "layers.1.ffn.experts.w_out_HEFL": 1 / math.sqrt(64),
        "layers.1.ffn.shared.w_out.weight": depth / math.sqrt(64),
    }
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for name, std in want.items():
        assert float(parameters[name].std()) == pytest.approx(std, rel=0.1), name
    for name, p in parameters.items():
        if "norm" in name:
            assert (p == 1).all(), name
    assert (parameters["layers.1.ffn.router.w_noise_HEL"] == 0).all()


def test_flat_experts_carry_the_depth_scale_themselves():
    model = Transformer(replace(SMALL, moe=MoEConfig(kind="moe", n_experts=8, d_expert=64)), seed=0)
    w_out = model.layers[0].ffn.experts.w_out_HEFL.detach()
    assert float(w_out.std()) == pytest.approx(1 / math.sqrt(8 * 64), rel=0.05)


def test_residual_stream_keeps_its_scale_over_depth():
    model = Transformer(replace(SMALL, n_layers=8), seed=0)
    with torch.no_grad():
        x = model.embed(torch.randint(0, 512, (2, 64)))
        for block in model.layers:
            x, _ = block(x, Context())
    assert 0.2 < float(x.std()) < 2.0


def test_what_two_models_share_starts_equal():
    """Embedding, attention and head of a pair; no two parameters of a model are alike."""
    arms = [Transformer(replace(SMALL, moe=moe), seed=3) for moe in (MoEConfig("dense"), SMALL.moe)]
    weights, others = ({n: p.detach() for n, p in arm.named_parameters()} for arm in arms)
    shared = {name for name in weights.keys() & others.keys() if ".ffn." not in name}
    assert {"embed.weight", "head.weight", "layers.3.mixer.q.weight"} <= shared
    for name in shared:
        assert torch.equal(weights[name], others[name]), name
    q, k = weights["layers.0.mixer.q.weight"], weights["layers.1.mixer.q.weight"]
    assert abs(float((q * k).mean() / (q.std() * k.std()))) < 0.05
    again = Transformer(replace(SMALL, moe=MoEConfig("dense")), seed=4)
    assert not torch.equal(again.embed.weight, weights["embed.weight"])


def test_values_are_those_of_a_generator_keyed_by_seed_and_name():
    """Written out: a checkpoint of step 0 can be made again by other code."""
    key = hashlib.blake2b(b"3 embed.weight", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    drawn = torch.randn(512, 128, generator=generator) * 0.02
    assert torch.equal(Transformer(SMALL, seed=3).embed.weight.detach(), drawn)
