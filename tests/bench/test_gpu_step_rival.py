"""The training step that Headway races against: one model, whatever computes its experts."""

import pytest
import torch

from bench.cpu_step import SMALL
from tests.compare import assert_close

pytest.importorskip("transformers")


def losses(*options) -> torch.Tensor:
    from bench.gpu_step_rival import rival_step

    tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    step = rival_step(SMALL, tokens, "cpu", *options)
    return torch.stack([step() for _ in range(4)])


def test_grouped_experts_and_masters_take_the_same_steps():
    truth = losses("float32", "eager")
    assert (truth.diff() < 0).all() and float(truth[0]) == pytest.approx(6.24, abs=0.1)
    assert_close(losses("float32", "grouped_mm"), truth, 1e-5)
    for weights in ("masters", "bfloat16"):
        narrow = losses(weights, "grouped_mm")
        assert_close(narrow, losses(weights, "eager"), 1e-3)
        assert_close(narrow, truth, 1e-2)  # some PyTorch draws other weights in bfloat16
        assert (narrow.diff() < 0).all()
    assert (losses("float32", "eager", True) > truth).all()  # with the balance loss
