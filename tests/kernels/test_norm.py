import pytest
import torch

from headway.kernels.norm import rms_norm, rms_norm_reference
from tests.compare import assert_close


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
