"""Causal attention against its definition in float64: output and every gradient, on both paths."""

import pytest
import torch

from headway.kernels import attention as module
from headway.kernels.attention import attention, attention_reference
from tests.compare import assert_close
from tests.kernels.cpp_paths import NATIVE_DTYPES, needs_native, switch_off, threads

# (output, gradients). In bfloat16 the rounding of the result alone costs 1.7e-3 rms, and P and dS are
# rounded before. dP − δ cancels where a row has few keys: of 2 positions the gradients are off by up
# to 2.6e-6 and 1.2e-2 (float32, bfloat16), from 64 positions on (d ≥ 16) by 6e-7 and 4.0e-3.
BOUNDS = {torch.float32: (1e-6, 3e-6), torch.bfloat16: (3e-3, 1e-2), torch.float64: (1e-12,) * 2}
LONG_BOUNDS = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (3e-3, 4.5e-3)}


def make(B, S, N, M, d, dtype, scale=1.0):
    """q, k, v that require gradients, and a gradient of the output."""
    shapes = ((B, S, N, d), (B, S, M, d), (B, S, M, d), (B, S, N, d))
    g = torch.Generator().manual_seed(S)
    q, k, v, d_out = (torch.randn(shape, generator=g) for shape in shapes)
    inputs = tuple(t.to(dtype).requires_grad_() for t in (scale * q, k, v))
    return inputs, d_out.to(dtype)


def run(inputs, d_out):
    """Output, dq, dk, dv."""
    out = attention(*inputs)
    return out, *torch.autograd.grad(out, inputs, d_out)


def run_reference(inputs, d_out):
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    out = attention_reference(*wide)
    return out, *torch.autograd.grad(out, wide, d_out.double())


def assert_equals_reference(inputs, d_out, bounds=BOUNDS):
    dtype = d_out.dtype
    got, want = run(inputs, d_out), run_reference(inputs, d_out)
    out_bound, grad_bound = bounds[dtype]
    assert got[0].is_contiguous() and all(t.dtype == dtype for t in got)
    assert_close(got[0], want[0], out_bound)
    for a, b in zip(got[1:], want[1:], strict=True):
        # of one position dq and dk are 0: absolute there
        assert_close(a, b, grad_bound if b.abs().max() > 1e-6 else 5e-5)


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("d", [2, 16, 24, 32, 64, 130])
@pytest.mark.parametrize("S", [1, 7, 64, 65, 200])
def test_equals_float64(S, d, heads, dtype):
    assert_equals_reference(
        *make(2, S, *heads, d, dtype), LONG_BOUNDS if S >= 64 and d > 2 else BOUNDS
    )


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("S", [256, 300, 601])
def test_keys_with_several_tiles_of_queries(S, dtype):
    assert_equals_reference(*make(1, S, 2, 1, 32, dtype), LONG_BOUNDS)


@needs_native
@pytest.mark.parametrize("scale", [0.0, 8.0, 30.0])
def test_flat_and_sharp_weights(scale):
    """Scores of a few hundred: weights of 1 and of less than float32 holds."""
    inputs, d_out = make(1, 70, 2, 2, 32, torch.float32, scale)
    got, want = run(inputs, d_out), run_reference(inputs, d_out)
    for a, b in zip(got, want, strict=True):  # a score's own rounding grows with it
        assert_close(a, b, 2e-6 if scale == 0 else 3e-6 * scale)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_float64_is_not_native_and_exact(heads):
    assert_equals_reference(*make(2, 9, *heads, 6, torch.float64))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_without_a_compiler(heads, monkeypatch):
    inputs, d_out = make(2, 40, *heads, 16, torch.float32)
    with_it = run(inputs, d_out)
    switch_off(monkeypatch, module)
    without = run(inputs, d_out)
    for a, b in zip(with_it, without, strict=True):
        assert a.shape == b.shape
        assert_close(a, b, 2e-6)


@needs_native
@pytest.mark.parametrize("d", [1, 5])
def test_odd_widths_take_the_other_path(d):
    inputs, d_out = make(1, 12, 2, 2, d, torch.float32)
    for a, b in zip(run(inputs, d_out), run_reference(inputs, d_out), strict=True):
        assert_close(a, b, 2e-6)


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_the_same_bits_on_any_number_of_threads(dtype):
    inputs, d_out = make(3, 130, 4, 2, 40, dtype)
    results = []
    for n in (1, 2, 3, 2):
        with threads(n):
            results.append(run(inputs, d_out))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_the_past_does_not_see_the_future(dtype):
    (q, k, v), d_out = make(1, 100, 2, 2, 16, dtype)
    before = run((q, k, v), d_out)[0]
    for changed in (k, v):
        changed.data[:, 41:] += 1
    after = run((q, k, v), d_out)[0]
    assert torch.equal(before[:, :41], after[:, :41])
    assert not torch.isclose(before[:, 41:], after[:, 41:]).all(-1).any()


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_inf_reach_what_depends_on_them(bad, dtype):
    at = 50
    for which in range(4):
        inputs, d_out = make(1, 100, 1, 1, 16, dtype)
        (*inputs, d_out)[which].data[0, at, 0, 3] = bad
        out, dq, dk, dv = (~t[0, :, 0].isfinite() for t in run(inputs, d_out))
        if which == 0:  # a query: its own row, and the keys that it sees
            assert out[at].all() and out.any(-1).sum() == 1
            assert dq[at].all() and dk[: at + 1].all() and dv[: at + 1].all()
        elif which == 1 and bad != bad:  # a key: all later rows (of ±inf a weight may become 0)
            assert out[at:].all() and not out[:at].any()
            assert dq[at:].all() and dk.all() and dv.all()
        elif which == 2:  # a value: one column of all later rows
            assert out[at:, 3].all() and not out[:, :3].any()
            assert dq[at:].all() and dk.all()
        elif which == 3:  # a gradient
            assert not out.any() and dq[at].all()
            assert dk[: at + 1].all() and dv[: at + 1, 3].all()


@needs_native
def test_non_contiguous_inputs_and_an_expanded_gradient():
    (q, k, v), _ = make(2, 33, 4, 2, 16, torch.float32)
    want = run((q, k, v), torch.ones(2, 33, 4, 16))
    far = tuple(
        t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v)
    )
    assert not far[0].is_contiguous()
    got = run(far, torch.ones(()).expand(2, 33, 4, 16))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_native
def test_are_well_formed_custom_operators():
    inputs, d_out = make(2, 20, 4, 2, 16, torch.float32)
    torch.library.opcheck(torch.ops.headway.attention.default, inputs)
    plain = tuple(t.detach() for t in inputs)
    out, lse = torch.ops.headway.attention(*plain)
    assert lse.shape == (2, 4, 20) and lse.dtype == torch.float32
    torch.library.opcheck(torch.ops.headway.attention_backward.default, (d_out, *plain, out, lse))


@needs_native
def test_compiles_whole_and_equals_eager():
    inputs, d_out = make(2, 20, 4, 2, 16, torch.float32)

    def both(q, k, v):
        return attention(q, k, v) * 2

    def grads(function):
        out = function(*inputs)
        return out, *torch.autograd.grad(out, inputs, d_out)

    compiled = grads(torch.compile(both, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled, grads(both), strict=True))
