"""Gradients under torch.compile on PyTorch's own paths, those of every GPU: PyTorch 2.11 traced a backward pass marked
`once_differentiable` to zeros, without a word."""

import pytest
import torch

from headway.kernels import cross_entropy, norm, rope
from tests.compare import assert_close
from tests.kernels.cpp_paths import switch_off


def cases():
    x, weight = torch.randn(6, 3, 2, 8), torch.randn(2, 8)
    tables = rope.rope_tables(torch.arange(3), 8, 1e4, torch.float32)
    wide, head = torch.randn(12, 16), torch.randn(30, 16)
    targets = torch.randint(0, 30, (12,))
    return {
        "norm": (lambda x, w: norm.rms_norm(x, w, 1e-6), (x, weight)),
        "norm and rope": (lambda x, w: norm.norm_rope(x, w, 1e-6, *tables), (x, weight[0])),
        "rope": (lambda x: rope.rope(x, *tables), (x,)),
        "cross-entropy": (
            lambda x, w: cross_entropy.cross_entropy(x, w, targets, 0.0),
            (wide, head),
        ),
        "log-probabilities": (
            lambda x, w: cross_entropy.token_log_probs(x, w, targets, 5.0),
            (wide, head),
        ),
    }


@pytest.mark.parametrize(
    "name", ["norm", "norm and rope", "rope", "cross-entropy", "log-probabilities"]
)
def test_gradients_are_those_of_the_eager_path(monkeypatch, name):
    torch.manual_seed(0)
    function, inputs = cases()[name]
    for each in (norm, rope, cross_entropy):
        switch_off(monkeypatch, each)
    results = []
    for call in (function, torch.compile(function, backend="aot_eager")):
        given = [t.clone().requires_grad_() for t in inputs]
        out = call(*given)
        results.append(torch.autograd.grad(out, given, torch.ones_like(out) * 0.5))
    for got, want in zip(results[1], results[0], strict=True):
        assert want.norm() > 0
        assert_close(got, want, 1e-6)
