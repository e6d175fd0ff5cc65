"""Cross-entropy of rows of logits in Triton, against float64."""

import pytest
import torch

from headway.kernels import cross_entropy as module
from headway.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    token_log_probs,
    token_log_probs_reference,
)
from tests.compare import assert_close

F32, BF16 = torch.float32, torch.bfloat16
BOUND = {F32: 1e-5, BF16: 1e-2}


def draw(device, T, V, dtype, scale=1.0):
    g = torch.Generator().manual_seed(T)
    x = (scale * torch.randn(T, 16, generator=g)).to(dtype).to(device).requires_grad_()
    w = torch.randn(V, 16, generator=g).to(device).requires_grad_()
    target = torch.randint(0, V, (T,), generator=g).to(device)
    target[[1, T - 1]] = -1
    return x, w, target


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("T", "V"), [(5, 11), (7, 70), (9, 130)])
def test_loss_and_gradients_equal_float64_in_any_chunks(device, monkeypatch, T, V, dtype, softcap):
    from headway.kernels.gpu import cross_entropy as kernel

    monkeypatch.setattr(kernel, "BLOCK", 64)  # of the vocabulary: one, two and three blocks
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4 * V)
    monkeypatch.setattr(module, "CHUNK_ON_GPU", 4 * V)
    x, w, target = draw(device, T, V, dtype)
    loss = cross_entropy(x, w, target, softcap)
    grads = torch.autograd.grad(loss, (x, w))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    want = cross_entropy_reference(*wide, target, softcap)
    assert loss.dtype == F32 and grads[1].dtype == F32
    for a, b in zip((loss, *grads), (want, *torch.autograd.grad(want, wide)), strict=True):
        assert_close(a, b, BOUND[dtype])


def test_log_probs_and_their_gradient(device):
    x, w, target = draw(device, 6, 40, F32)
    weight = torch.rand(6, device=device)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    got, want = token_log_probs(x, w, target), token_log_probs_reference(*wide, target)
    assert got[1] == got[5] == 0
    assert_close(got, want, 1e-5)
    grads = torch.autograd.grad(got, (x, w), weight)
    for a, b in zip(grads, torch.autograd.grad(want, wide, weight.double()), strict=True):
        assert_close(a, b, 1e-5)


def test_extremes(device):
    """Huge logits do not overflow; NaN stays in its row; a target beyond the vocabulary is NaN."""
    logits = torch.tensor([[300.0, -300, 5], [1, torch.nan, 2], [1, 2, 3], [0, -torch.inf, 0]])
    target = torch.tensor([1, 0, 7, 1])
    loss = module._rows(logits.to(device), target.to(device), 0.0, False)[0].cpu()
    assert loss[0] == 600 and loss[1:3].isnan().all() and loss[3] == torch.inf
