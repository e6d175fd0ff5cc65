"""A runner says whether its passes are batch-invariant."""

import pytest
import torch

from headway.config import ModelConfig, MoEConfig
from headway.kernels.packed import batch_invariant
from headway.model.packing import pack_
from headway.model.transformer import Transformer
from headway.serve.runner import Runner


@pytest.mark.parametrize("mixer", ["attention", "mla"])
def test_what_is_batch_invariant(mixer):
    sizes = {"vocab_size": 20, "n_layers": 1, "d_model": 16, "n_heads": 2, "mixer": mixer}
    config = ModelConfig(**sizes, moe=MoEConfig(kind="moe", n_experts=4, top_k=2, d_expert=8))
    model = Transformer(config, seed=0).eval()
    runner = Runner(model)
    runner.allocate({0: 1}, 1)
    assert not runner.batch_invariant, "F.linear's sums depend on the number of rows"
    pack_(model, torch.float32)
    assert runner.batch_invariant == batch_invariant(model.device, model.dtype)
