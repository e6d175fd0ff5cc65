import pytest
import torch

from headway.kernels import cross_entropy as module
from headway.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from tests.compare import assert_close


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("chunk", [7, 33, 1 << 21])
def test_equals_reference_in_any_chunks(softcap, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    x = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, (13,))
    target[[2, 5]] = -1
    got, want = cross_entropy(x, w, target, softcap), cross_entropy_reference(x, w, target, softcap)
    assert_close(got, want, 1e-12)
    scale = torch.tensor(0.37, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got, (x, w), scale),
        torch.autograd.grad(want, (x, w), scale),
        strict=True,
    ):
        assert_close(a, b, 1e-12)


def test_float32_and_bfloat16():
    x, w = torch.randn(20, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    target = torch.randint(0, 30, (20,))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    want = cross_entropy_reference(*wide, target)
    want_grads = torch.autograd.grad(want, wide)
    got = cross_entropy(x, w, target)
    assert_close(got, want, 1e-5)
    for a, b in zip(torch.autograd.grad(got, (x, w)), want_grads, strict=True):
        assert_close(a, b, 1e-5)
    low = x.detach().bfloat16().requires_grad_()
    loss = cross_entropy(low, w, target)
    assert loss.dtype == torch.float32
    assert_close(loss, want, 1e-2)
    for a, b in zip(torch.autograd.grad(loss, (low, w)), want_grads, strict=True):
        assert_close(a, b, 2e-2)


def test_all_ignored_gives_zero_loss_and_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(x, torch.randn(5, 4), torch.full((3,), -1))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_logits_are_never_whole(monkeypatch):
    """The largest tensor made is a chunk, not T×V."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4 * 500)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    x, w = torch.randn(64, 3, requires_grad=True), torch.randn(500, 3, requires_grad=True)
    with Watch():
        cross_entropy(x, w, torch.randint(0, 500, (64,))).backward()
    assert largest <= 4 * 500
