import pytest
import torch

from headway.kernels import activation as module
from headway.kernels.activation import (
    activate,
    activate_into,
    activate_reference,
    activate_with_slope,
    gate_heads,
    n_inputs,
    softcap,
)
from tests.compare import assert_close
from tests.kernels.cpp_paths import BOUND, NATIVE_DTYPES, needs_native, switch_off, threads

ACTIVATIONS = ["swiglu", "relu2", "gelu", "swiglu_clamped"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forms_agree_and_slope_is_the_derivative(activation):
    pre = (3 * torch.randn(5, n_inputs(activation) * 7, dtype=torch.float64)).requires_grad_()
    hid, slope = torch.empty(5, 7, dtype=torch.float64), torch.empty_like(pre)
    activate_with_slope(pre.detach(), activation, hid, slope)
    want = activate(pre, activation)
    assert_close(hid, want, 1e-14)
    assert_close(activate_into(pre.detach(), activation, torch.empty_like(hid)), want, 1e-14)
    assert_close(slope, torch.autograd.grad(want.sum(), pre)[0], 1e-14)


def make(shape, activation, dtype):
    torch.manual_seed(0)
    pre = (3 * torch.randn(*shape[:-1], n_inputs(activation) * shape[-1])).to(dtype)
    return pre.requires_grad_(), torch.randn(shape).to(dtype)


def run(pre, activation, d_hid):
    hid = activate(pre, activation)
    return hid, torch.autograd.grad(hid, pre, d_hid)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("native_path", [True, False])
@pytest.mark.parametrize("shape", [(70, 384), (2, 3, 33), (300, 1), (5, 1023)], ids=str)
def test_both_paths_equal_float64(shape, activation, dtype, native_path, monkeypatch):
    if not native_path:
        switch_off(monkeypatch, module)
    pre, d_hid = make(shape, activation, dtype)
    wide = pre.detach().double().requires_grad_()
    want = activate_reference(wide, activation)
    d_want = torch.autograd.grad(want, wide, d_hid.double())[0]
    got = run(pre, activation, d_hid)
    # PyTorch rounds silu(gate) as well before it multiplies, and d_hid·up
    bound = BOUND[dtype] * (1 if native_path or dtype == torch.float32 else 2)
    for a, b in zip(got, (want, d_want), strict=True):
        assert a.dtype == dtype
        assert_close(a, b, bound)


@needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_nan_and_inf(activation):
    """Every value where float32 or an exponential ends."""
    ends = torch.tensor([-torch.inf, -1e30, -200, -88, -20, 0, 20, 88, 200, 1e15, torch.inf])
    ends = torch.cat((ends, torch.tensor([torch.nan])))
    pre = torch.stack((ends, torch.full_like(ends, 0.5)), dim=1)[:, : n_inputs(activation)]
    pre = pre.contiguous().requires_grad_()
    hid, d_pre = run(pre, activation, torch.ones(len(ends), 1))
    want = activate_reference(pre, activation)
    d_want = torch.autograd.grad(want.sum(), pre)[0]
    finite = slice(1, -2)
    torch.testing.assert_close(hid[finite], want[finite], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_pre[finite], d_want[finite], rtol=1e-5, atol=1e-5)
    if activation == "swiglu_clamped":  # bounded, and NaN is no side of a limit
        torch.testing.assert_close(hid, want, equal_nan=True)
        torch.testing.assert_close(d_pre, d_want, equal_nan=True)
        return
    assert hid[-1].isnan().all() and d_pre[-1].isnan().all() and hid[-2].isinf().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_bits_on_any_number_of_threads(activation):
    pre, d_hid = make((301, 90), activation, torch.float32)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(run(pre, activation, d_hid))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_non_contiguous_input_and_an_expanded_gradient():
    pre, _ = make((6, 20), "swiglu", torch.float32)
    far = pre.detach().T.contiguous().T.requires_grad_()
    assert not far.is_contiguous()
    got = run(far, "swiglu", torch.ones(()).expand(6, 20))
    for a, b in zip(got, run(pre, "swiglu", torch.ones(6, 20)), strict=True):
        assert torch.equal(a, b)
    assert activate(pre[:0], "swiglu").shape == (0, 20)


@needs_native
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_is_a_well_formed_custom_operator(activation):
    pre, d_hid = make((2, 4, 20), activation, torch.float32)
    torch.library.opcheck(torch.ops.headway.activate.default, (pre, activation))
    backward = torch.ops.headway.activate_backward.default
    torch.library.opcheck(backward, (d_hid, pre.detach(), activation))


@needs_native
def test_compiles_whole_and_equals_eager():
    pre, _ = make((20, 24), "swiglu", torch.float32)
    with torch.no_grad():
        compiled = torch.compile(activate, fullgraph=True)(pre, "swiglu")
    assert torch.equal(compiled, activate(pre, "swiglu"))


@needs_native
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_softcap_is_the_same_wherever_an_element_lies(size):
    logits = size * 40 * torch.randn(9, 1003)
    with torch.no_grad():
        out = softcap(logits, 30.0)
        assert_close(out, 30 * torch.tanh(logits.double() / 30), 1e-6)
        for at in (1, 500, 1002):
            assert torch.equal(softcap(logits[3, at : at + 1], 30.0), out[3, at : at + 1])
        with threads(2):
            assert torch.equal(softcap(logits, 30.0), out)
    assert softcap(logits, 0.0) is logits
    leaf = logits[:1].clone().requires_grad_()
    softcap(leaf, 30.0).sum().backward()
    assert_close(leaf.grad, 1 - torch.tanh(logits[:1].double() / 30) ** 2, 1e-5)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_gates_of_heads(dtype):
    y, gate = torch.randn(2, 7, 3, 21).to(dtype), torch.randn(2, 7, 3).to(dtype)
    want = y.double() * torch.sigmoid(gate.double()).unsqueeze(-1)
    assert_close(gate_heads(y, gate), want, 2 * BOUND[dtype])
    with torch.no_grad():
        out = gate_heads(y, gate)
        assert_close(out, want, BOUND[dtype])
        assert torch.equal(gate_heads(y[1, 4], gate[1, 4]), out[1, 4])
