import pytest
import torch

from headway.kernels import norm
from headway.kernels.norm import rms_norm, rms_norm_reference
from tests.compare import assert_close
from tests.kernels.cpp_paths import BOUND, NATIVE_DTYPES, needs_native, switch_off, threads


@pytest.mark.parametrize(
    "shape, weight_shape", [((5, 8), (8,)), ((3, 4, 2, 6), (6,)), ((7, 3, 4), (3, 4))]
)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)]
)
def test_equals_reference_with_gradients(shape, weight_shape, dtype, bound):
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    weight = (
        torch.randn(weight_shape, dtype=torch.float64)
        .to(dtype if dtype != torch.bfloat16 else torch.float32)
        .requires_grad_()
    )
    d_out = torch.randn(shape, dtype=dtype)
    out = rms_norm(x, weight, 1e-6)
    grads = torch.autograd.grad(out, (x, weight), d_out)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = rms_norm_reference(wide[0], wide[1], 1e-6)
    expected_grads = torch.autograd.grad(expected, wide, d_out.double())
    assert out.dtype == x.dtype
    for got, want in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert_close(got, want, bound)


def test_zero_vector_gives_zero():
    assert (rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6) == 0).all()


def test_reference_equals_torch():
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert_close(rms_norm_reference(x, weight, 1e-6), torch.rms_norm(x, (8,), weight, 1e-6), 1e-12)


def make(shape, weight_shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = (1 + torch.randn(weight_shape)).requires_grad_()
    return x, weight, torch.randn(shape).to(dtype)


def run(x, weight, d_out):
    out = rms_norm(x, weight, 1e-6)
    return out, *torch.autograd.grad(out, (x, weight), d_out)


def run_wide(x, weight, d_out):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    out = rms_norm_reference(x, weight, 1e-6)
    return out, *torch.autograd.grad(out, (x, weight), d_out.double())


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("native_path", [True, False])
@pytest.mark.parametrize(
    "shape, weight_shape",
    [
        ((70, 384), (384,)),
        ((3, 5, 33), (33,)),
        ((1, 4096), (4096,)),
        ((2, 1023), (1023,)),
        ((9, 7, 6, 64), (6, 64)),
        ((40, 5, 3, 17), (3, 17)),
        ((300, 3), (3,)),
        ((1100, 2, 15), (2, 15)),
    ],
)
def test_both_paths_equal_float64(shape, weight_shape, dtype, native_path, monkeypatch):
    if not native_path:
        switch_off(monkeypatch, norm)
    inputs = make(shape, weight_shape, dtype)
    got, want = run(*inputs), run_wide(*inputs)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, BOUND[a.dtype])


def test_no_rows():
    out, dx, d_weight = run(*make((0, 3, 5), (3, 5), torch.float32))
    assert out.shape == dx.shape == (0, 3, 5) and (d_weight == 0).all()


def test_nan_and_inf_stay_in_their_row():
    x, weight, d_out = make((4, 20), (20,), torch.float32)
    x.data[1, 18], x.data[2, 3] = torch.nan, torch.inf
    out, dx, d_weight = run(x, weight, d_out)
    assert out[1].isnan().all() and out[2, 3].isnan() and dx[1:3].isnan().all()
    assert out[[0, 3]].isfinite().all() and dx[[0, 3]].isfinite().all()
    assert d_weight.isnan().all()


@needs_native
def test_non_contiguous_inputs_and_an_expanded_gradient():
    x, weight, _ = make((6, 3, 20), (3, 20), torch.float32)
    want = run(x, weight, torch.ones(6, 3, 20))
    far = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    weight_far = weight.detach().T.contiguous().T.requires_grad_()
    assert not far.is_contiguous() and not weight_far.is_contiguous()
    for a, b in zip(run(far, weight_far, torch.ones(()).expand(6, 3, 20)), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("shape, weight_shape", [((999, 96), (96,)), ((333, 3, 40), (3, 40))])
def test_the_same_bits_on_any_number_of_threads(dtype, shape, weight_shape):
    inputs = make(shape, weight_shape, dtype)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(run(*inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_is_a_well_formed_custom_operator():
    x, weight, _ = make((4, 3, 20), (3, 20), torch.float32)
    torch.library.opcheck(torch.ops.headway.rms_norm.default, (x, weight, 1e-6, None, None))
    scale = torch.rand(4, 3)
    torch.library.opcheck(
        torch.ops.headway.rms_norm_backward.default,
        (x.detach(), x.detach(), weight.detach(), scale, None, None),
    )


@needs_native
def test_compiles_whole_and_equals_eager():
    inputs = make((40, 48), (48,), torch.float32)
    with torch.no_grad():
        compiled = torch.compile(rms_norm, fullgraph=True)(*inputs[:2], 1e-6)
    assert torch.equal(compiled, rms_norm(*inputs[:2], 1e-6))
