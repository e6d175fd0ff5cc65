"""A small model with random weights, in float64 so that no tie is near, and engines of it."""

from collections.abc import Callable

import pytest
import torch

from headway.config import EngineConfig, ModelConfig, MoEConfig
from headway.data.tokenizer import ByteTokenizer
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.serve.engine import Engine

MOE = MoEConfig(kind="multi_head_latent", n_heads=2, n_experts=6, top_k=2, d_expert=16)
CONFIG = ModelConfig(
    vocab_size=320, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, init_std=0.4, moe=MOE
)


@pytest.fixture(scope="session")
def model() -> Transformer:
    return Transformer(CONFIG, Compute(torch.float64), seed=5).double().eval()


@pytest.fixture
def engine(model) -> Callable[..., Engine]:
    """Makes an engine: `engine(cache_tokens=…)`."""

    def make(**options) -> Engine:
        sizes = EngineConfig(**{"max_len": 256, "max_requests": 8, **options})
        return Engine(model, ByteTokenizer(), sizes)

    return make
