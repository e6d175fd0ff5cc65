import pytest
import torch

from headway.kernels import cross_entropy as module
from headway.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    target_and_best,
    target_and_best_reference,
    token_log_probs,
    token_log_probs_reference,
)
from headway.kernels.packed import pack
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
    loss, want = (f(x, w, target, softcap) for f in (cross_entropy, cross_entropy_reference))
    assert_close(loss, want, 1e-12)
    scale = torch.tensor(0.37, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(loss, (x, w), scale),
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
    loss = cross_entropy(x, w, target)
    assert_close(loss, want, 1e-5)
    for a, b in zip(torch.autograd.grad(loss, (x, w)), want_grads, strict=True):
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
    (dw,) = torch.autograd.grad(cross_entropy(x, w, target), w)
    assert dw.dtype == torch.bfloat16
    assert_close(dw, want, 5e-3)


def test_all_ignored_gives_zero_loss_and_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(x, torch.randn(5, 4), torch.full((3,), -1))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("function", [cross_entropy, token_log_probs])
def test_full_logits_are_never_in_memory(monkeypatch, function):
    """The largest tensor that is created is a chunk, not T×V."""
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
        function(x, w, torch.randint(0, 500, (64,))).sum().backward()
    assert largest <= 4 * 500


def weighted(x, w, target, weight, softcap=0.0):
    """Log-probabilities from a plain log_softmax, 0 where ignored, and the gradients of their weighted sum."""
    logits = x @ w.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    log_p = logits.log_softmax(-1).gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    log_p = torch.where(target >= 0, log_p, 0.0)
    return log_p, torch.autograd.grad(log_p, (x, w), weight)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("chunk", [7, 33, 34, 1 << 21])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_log_probs_equal_log_softmax_in_any_chunks(softcap, chunk, dtype, bound, monkeypatch):
    """With weights of either sign, also for ignored targets; 11 logits per token."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    x, w = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (13, 11))
    target, weight = torch.randint(0, 11, (13,)), torch.randn(13, dtype=torch.float64)
    target[[2, 5]] = -1
    want, want_grads = weighted(x, w, target, weight, softcap)
    xs, ws = (t.detach().to(dtype).requires_grad_() for t in (x, w))
    for function in (token_log_probs, token_log_probs_reference):
        log_p = function(xs, ws, target, softcap)
        assert log_p.dtype == dtype and (log_p[[2, 5]] == 0).all()
        assert_close(log_p, want, bound)
        dx, dw = torch.autograd.grad(log_p, (xs, ws), weight.to(dtype))
        assert (dx[[2, 5]] == 0).all()
        for a, b in zip((dx, dw), want_grads, strict=True):
            assert_close(a, b, bound)


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_log_probs_of_one_input_that_is_frozen(frozen):
    x, w = torch.randn(9, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    target, weight = torch.randint(0, 11, (9,)), torch.rand(9, dtype=torch.float64)
    x.requires_grad_(), w.requires_grad_()
    dx, dw = weighted(x, w, target, weight)[1]
    (x if frozen == "x" else w).requires_grad_(False)
    (token_log_probs(x, w, target) * weight).sum().backward()
    assert (x if frozen == "x" else w).grad is None
    free, want = (w, dw) if frozen == "x" else (x, dx)
    assert_close(free.grad, want, 1e-12)


def test_log_probs_in_bfloat16(monkeypatch):
    """The gradient of a weight that is stored in bfloat16 is summed over 500 chunks in float32."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    x = (1 + 0.1 * torch.randn(500, 16)).bfloat16().requires_grad_()
    w = torch.randn(30, 16).bfloat16().requires_grad_()
    target, weight = torch.randint(0, 30, (500,)), torch.rand(500)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    want, want_grads = weighted(*wide, target, weight.double())
    log_p = token_log_probs(x, w, target)
    assert log_p.dtype == torch.float32
    assert_close(log_p, want, 1e-2)
    grads = torch.autograd.grad(log_p, (x, w), weight)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    for a, b in zip(grads, want_grads, strict=True):
        assert_close(a, b, 1e-2)


def test_log_probs_under_torch_func():
    x, w = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    target = torch.randint(0, 11, (4, 5))

    def total(x, w, target):
        return token_log_probs(x, w, target).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(total, argnums=1), (0, None, 0))(x, w, target)
    for i in range(4):
        leaf = w.clone().requires_grad_()
        (want,) = torch.autograd.grad(total(x[i], leaf, target[i]), leaf)
        assert_close(per_sample[i], want, 1e-12)


def test_the_sum_of_log_probs_is_the_loss():
    x, w = torch.randn(50, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    target = torch.randint(-1, 40, (50,))
    loss, nats = cross_entropy(x, w, target), -token_log_probs(x, w, target).sum()
    assert_close(nats, loss, 1e-6)
    for a, b in zip(*(torch.autograd.grad(y, (x, w)) for y in (nats, loss)), strict=True):
        assert_close(a, b, 1e-6)


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


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [7, 33, 1 << 21])
def test_the_best_is_the_target_where_nothing_is_likelier(
    chunk, dtype, bound, softcap, monkeypatch
):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    x, w = torch.randn(13, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
    likeliest = (x @ w.T).argmax(1)
    target = torch.where(torch.arange(13) % 2 == 0, likeliest, (likeliest + 1) % 11)
    target[5] = -1
    want = target_and_best_reference(x.double(), w.double(), target, softcap)
    for weight in (w, pack(w, dtype)):
        log_probs, best = target_and_best(x, weight, target, softcap)
        assert_close(log_probs, want[0], bound)
        assert_close(best, want[1], bound)
        assert torch.equal((log_probs == best), (target == likeliest) | (target < 0))
    assert_close(
        token_log_probs(x, w, target, softcap), target_and_best(x, w, target, softcap)[0], 0
    )


def test_the_smallest_lead_is_one():
    """0 and 1e-8 are different logits whose log-probabilities round to one number."""
    x, w = torch.tensor([[1e-8], [1e-8]]), torch.tensor([[0.0], [1.0]])
    log_probs, best = target_and_best(x, w, torch.tensor([0, 1]))
    assert (log_probs == best).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_equal_logits_the_first_is_the_best(dtype):
    """In bfloat16 two largest logits are often equal; counted as both right, a model is right more
    often than in float32."""
    x, w = torch.ones(3, 1, dtype=dtype), torch.tensor([[2.0], [2.0], [1.0]], dtype=dtype)
    w.requires_grad_()
    log_probs, best = target_and_best(x, w, torch.arange(3))
    assert (log_probs == best).tolist() == [True, False, False]
    assert_close(best.double(), torch.log_softmax(w.detach()[:, 0].double(), 0)[:1].expand(3), 1e-6)
    assert not best.requires_grad
