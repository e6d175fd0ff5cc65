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
