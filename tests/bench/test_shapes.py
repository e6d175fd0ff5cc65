"""The models of the quality benches have equal sizes."""

import pytest

from bench.quality import models
from bench.shapes import equal_shape, parameters
from headway.model.transformer import Transformer


def test_active_parameters_agree_within_three_percent():
    active = [parameters(model)[1] for model in models(257).values()]
    assert max(active) / min(active) < 1.03


def test_total_parameters_of_sparse_models_agree_within_one_expert():
    total = [parameters(model)[0] for name, model in models(257).items() if name != "dense"]
    assert max(total) / min(total) < 1.05  # an expert more or less per layer is 5%


@pytest.mark.parametrize("kind", ["dense", "moe", "latent", "multi_head_latent"])
def test_total_equals_the_model_without_its_embedding(kind):
    model = equal_shape(
        kind, vocab_size=17, d_model=32, n_layers=2, n_heads=2, head_width=16, d_shared=4
    )
    counted = sum(p.numel() for p in Transformer(model, seed=0).parameters())
    assert parameters(model)[0] == counted - 17 * 32
