import pytest
import torch

from headway.kernels.activation import activate, activate_into, activate_with_slope, n_inputs
from tests.compare import assert_close


@pytest.mark.parametrize("activation", ["swiglu", "relu2", "gelu"])
def test_forms_agree_and_slope_is_the_derivative(activation):
    pre = (3 * torch.randn(5, n_inputs(activation) * 7, dtype=torch.float64)).requires_grad_()
    hid, slope = torch.empty(5, 7, dtype=torch.float64), torch.empty_like(pre)
    activate_with_slope(pre.detach(), activation, hid, slope)
    want = activate(pre, activation)
    assert_close(hid, want, 1e-14)
    assert_close(activate_into(pre.detach(), activation, torch.empty_like(hid)), want, 1e-14)
    assert_close(slope, torch.autograd.grad(want.sum(), pre)[0], 1e-14)
