import pytest
import torch

from headway.kernels import cross_entropy as module
from headway.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from tests.compare import assert_close
from tests.kernels.cpp_paths import BOUND, NATIVE_DTYPES, needs_native, switch_off, threads


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


def test_weights_stored_in_bfloat16_are_summed_over_chunks_in_float32(monkeypatch):
    """500 chunks of a row, whose gradients are about alike: in bfloat16 the sum would stop growing."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    x = (1 + 0.1 * torch.randn(500, 16)).bfloat16()
    w = torch.randn(30, 16).bfloat16().requires_grad_()
    target = torch.randint(0, 30, (500,))
    wide = w.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(cross_entropy_reference(x.double(), wide, target), wide)
    (got,) = torch.autograd.grad(cross_entropy(x, w, target), w)
    assert got.dtype == torch.bfloat16
    assert_close(got, want, 5e-3)


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


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("native_path", [True, False])
@pytest.mark.parametrize("V", [1, 15, 64, 501])
def test_rows_equal_float64(V, softcap, dtype, native_path, monkeypatch):
    """Loss and gradient of given logits, some ignored, some far from 0."""
    if not native_path:
        switch_off(monkeypatch, module)
    torch.manual_seed(0)
    logits = (4 * torch.randn(90, V)).to(dtype)
    logits[:10] -= 200
    target = torch.randint(0, V, (90,))
    target[[2, 50]] = -1
    wide = logits.double().requires_grad_()
    bounded = softcap * torch.tanh(wide / softcap) if softcap else wide
    want = torch.nn.functional.cross_entropy(bounded, target, ignore_index=-1, reduction="none")
    d_want = torch.autograd.grad(want.sum(), wide)[0]
    for back in (False, True):
        loss, d_logits = module._rows(logits.clone(), target, softcap, back)
        assert loss.dtype == torch.float32
        assert_close(loss, want, 1e-5)
    assert d_logits is not None and d_logits.dtype == dtype
    assert_close(d_logits, d_want, BOUND[dtype])


@needs_native
def test_native_rows_nan_threads_and_a_target_beyond_the_vocabulary():
    logits = torch.randn(300, 70)
    logits[3, 69], logits[4, 2] = torch.nan, torch.inf
    target = torch.randint(0, 70, (300,))
    target[5] = 70
    results = []
    for n in (1, 2):
        with threads(n):
            results.append(module._rows(logits.clone(), target, 3.0, True))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    loss, d_logits = module._rows(logits.clone(), target, 0.0, True)
    assert d_logits is not None and loss[3:6].isnan().all() and d_logits[3:5].isnan().any(1).all()
    assert loss[[0, 1, 2, *range(6, 300)]].isfinite().all()
    finite = (logits[6:9].clone(), target[6:9], 3.0, True)
    torch.library.opcheck(torch.ops.headway.cross_entropy_rows.default, finite)
