"""Causal attention against its definition in float64: output and every gradient, on both paths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def first_keys(S, window=0, documents=((),)):
    """`first_BS` by its definition; a row of `documents` holds the positions where they begin."""
    rows = [
        [
            max([begin for begin in begins if begin <= i] + [i - window + 1 if window else 0, 0])
            for i in range(S)
        ]
        for begins in documents
    ]
    return torch.tensor(rows, dtype=torch.int32)


def run(inputs, d_out, first_BS=None):
    """Output, dq, dk, dv."""
    out = attention(*inputs, first_BS=first_BS)
    return out, *torch.autograd.grad(out, inputs, d_out)


def run_reference(inputs, d_out, first_BS=None):
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    out = attention_reference(*wide, first_BS=first_BS)
    return out, *torch.autograd.grad(out, wide, d_out.double())


def assert_equals_reference(inputs, d_out, bounds=BOUNDS, first_BS=None, typical=0.0):
    """`typical`: the size of a gradient to expect where few keys make it small."""
    dtype = d_out.dtype
    got, want = run(inputs, d_out, first_BS), run_reference(inputs, d_out, first_BS)
    out_bound, grad_bound = bounds[dtype]
    assert got[0].is_contiguous() and all(t.dtype == dtype for t in got)
    assert_close(got[0], want[0], out_bound)
    for a, b in zip(got[1:], want[1:], strict=True):
        # of one position dq and dk are 0: absolute there
        bound = grad_bound if b.abs().max() > 1e-6 else 5e-5
        assert_close(a, b, bound, typical * b.numel() ** 0.5)


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
    torch.library.opcheck(
        torch.ops.headway.attention_backward.default, (d_out, *plain, None, None, out, lse, None)
    )


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


def test_the_reference_with_first_keys_is_softmax_over_what_is_seen():
    (q, k, v), _ = make(2, 7, 2, 1, 4, torch.float64)
    first_BS = first_keys(7, 3, documents=[(), (2, 3)])
    got = attention_reference(q, k, v, first_BS=first_BS)
    for b, i, n in ((0, 0, 0), (0, 6, 1), (1, 1, 0), (1, 2, 1), (1, 3, 0), (1, 6, 0)):
        seen = slice(int(first_BS[b, i]), i + 1)
        weights = torch.softmax(k[b, seen, 0] @ q[b, i, n] / 2, 0)
        assert_close(got[b, i, n], weights @ v[b, seen, 0], 1e-14)
    assert first_BS.tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 0, 2, 3, 3, 3, 4]]


DOCUMENTS = {
    "none": lambda S: [(), ()],
    "of one token": lambda S: [range(S), range(1, S)],
    "many": lambda S: [range(0, S, 13), (S // 3, S // 2)],
}


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("window", [0, 1, 2, 5, -1, -2])
@pytest.mark.parametrize("S", [7, 65, 301])
def test_windows_and_documents_equal_float64(S, window, documents, dtype):
    """Rows that differ; a window below 0 counts from the end: S and S − 1."""
    window = S + 1 + window if window < 0 else window
    first_BS = first_keys(S, window, DOCUMENTS[documents](S))
    assert_equals_reference(*make(2, S, 4, 2, 24, dtype), first_BS=first_BS)


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    S=st.integers(1, 330),
    window=st.integers(0, 340),
    cuts=st.lists(st.sets(st.floats(0, 1), max_size=9), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    dtype=st.sampled_from(NATIVE_DTYPES),
)
def test_any_window_and_documents_equal_float64(S, window, cuts, heads, dtype):
    documents = [[int(cut * (S - 1)) for cut in row] for row in cuts]
    first_BS = first_keys(S, window, documents)
    case = make(len(cuts), S, *heads, 8, dtype)
    assert_equals_reference(*case, first_BS=first_BS, typical=0.1)


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("S", [1, 24, 33, 300])
def test_first_keys_of_zero_change_no_bit(S, dtype):
    inputs, d_out = make(2, S, 4, 2, 16, dtype)
    causal, bounded = run(inputs, d_out), run(inputs, d_out, first_keys(S, S, [(), (0,)]))
    assert all(torch.equal(a, b) for a, b in zip(causal, bounded, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_documents_do_not_change_each_other_by_a_bit(dtype):
    """Documents that begin inside of blocks, and pairs of bfloat16, of two documents."""
    inputs, d_out = make(1, 150, 4, 2, 16, dtype)
    first_BS = first_keys(150, documents=[(61, 99)])
    before = run(inputs, d_out, first_BS)
    for changed in (*inputs, d_out):
        changed.data[:, 61:99] += 1
    after = run(inputs, d_out, first_BS)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :61], b[:, :61]) and torch.equal(a[:, 99:], b[:, 99:])
        assert not torch.equal(a[:, 61:99], b[:, 61:99])


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_with_windows_the_same_bits_on_any_number_of_threads(dtype):
    inputs, d_out = make(3, 130, 4, 2, 40, dtype)
    first_BS = first_keys(130, 50, [(), (70,), range(130)])
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(run(inputs, d_out, first_BS))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("window", [0, 1, 4, 39, 40])
def test_windows_without_a_compiler_and_in_float64(window, monkeypatch):
    first_BS = first_keys(40, window, [(), (3, 17, 18)])
    assert_equals_reference(*make(2, 40, 4, 2, 6, torch.float64), first_BS=first_BS)
    inputs, d_out = make(2, 40, 4, 2, 16, torch.float32)
    with_it = run(inputs, d_out, first_BS)
    switch_off(monkeypatch, module)
    assert not module.reads_first(torch.device("cpu"), torch.float32)
    for a, b in zip(with_it, run(inputs, d_out, first_BS), strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=2e-6)


@needs_native
def test_operators_with_first_keys_are_well_formed_and_compile():
    inputs, d_out = make(2, 20, 4, 2, 16, torch.float32)
    first_BS = first_keys(20, 6, [(), (4,)])
    torch.library.opcheck(torch.ops.headway.attention.default, (*inputs, first_BS))
    plain = tuple(t.detach() for t in inputs)
    saved = torch.ops.headway.attention(*plain, first_BS)
    arguments = (d_out, *plain, first_BS, None, *saved, None)
    torch.library.opcheck(torch.ops.headway.attention_backward.default, arguments)

    def grads(function):
        out = function(*inputs, first_BS=first_BS)
        return out, *torch.autograd.grad(out, inputs, d_out)

    compiled = grads(torch.compile(attention, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled, grads(attention), strict=True))


@needs_native
def test_torch_func_and_second_derivatives_with_first_keys():
    (q, k, v), d_out = make(2, 12, 2, 1, 4, torch.float32)
    first_BS = first_keys(12, 5, [(), (4,)])

    def loss(q, function=attention):
        return (function(q, k, v, first_BS=first_BS) * d_out).sum()

    want = run_reference((q, k, v), d_out, first_BS)[1]
    assert_close(torch.func.grad(loss)(q), want, 1e-5)

    def curvature(function):
        (dq,) = torch.autograd.grad(loss(q, function), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), q)[0]

    assert_close(curvature(attention), curvature(attention_reference), 1e-5)
