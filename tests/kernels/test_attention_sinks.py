"""Sinks and scales of attention against the definition in float64, on every path."""

import pytest
import torch

from headway.kernels import attention as module
from headway.kernels.attention import attention, attention_reference, causal_mask
from tests.compare import assert_close
from tests.kernels.cpp_paths import NATIVE_DTYPES, needs_native, switch_off

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(S, keys, N, M, d, dtype):
    g = torch.Generator().manual_seed(S)
    shapes = ((2, S, N, d), (2, keys, M, d), (2, keys, M, d))
    inputs = [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sinks_N = torch.linspace(-2, 3, N, dtype=wide).requires_grad_()
    return [*inputs, sinks_N], torch.randn(2, S, N, d, generator=g).to(dtype)


def run(function, inputs, d_out, mask, first_BS, scale):
    q, k, v, sinks_N = inputs
    out = function(q, k, v, mask, first_BS, sinks_N, scale)
    return out, *torch.autograd.grad(out, inputs, d_out)


def check(inputs, d_out, mask=None, first_BS=None, scale=None):
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got = run(attention, inputs, d_out, mask, first_BS, scale)
    want = run(attention_reference, wide, d_out.double(), mask, first_BS, scale)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, BOUNDS[d_out.dtype])
    return got


@pytest.mark.parametrize("dtype", [torch.float64, *NATIVE_DTYPES])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("windowed", [False, True])
def test_equals_float64(dtype, native, scale, windowed, monkeypatch):
    if not native:
        switch_off(monkeypatch, module)
    inputs, d_out = make(40, 40, 4, 2, 16, dtype)
    first = (torch.arange(40) - 5).clamp(min=0).int().expand(2, -1).contiguous()
    check(inputs, d_out, first_BS=first if windowed else None, scale=scale)


def test_a_mask_and_late_queries():
    inputs, d_out = make(3, 9, 4, 2, 8, torch.float64)
    check(inputs, d_out, causal_mask(torch.arange(6, 9), 9))
    each = torch.tensor([[5, 6, 7], [2, 3, 4]])
    check(inputs, d_out, causal_mask(each, 9).unsqueeze(1))
    check(*make(1, 9, 4, 2, 8, torch.float64))  # one query after the last key


def test_a_sink_takes_weight():
    """A sink of −∞ takes none, one that is large all; the gradient is minus its share of δ."""
    (q, k, v, _), _ = make(7, 7, 2, 2, 4, torch.float64)
    without = attention(q, k, v)
    for value, factor in ((-1e9, 1.0), (1e9, 0.0)):
        sinks = torch.full((2,), value, dtype=torch.float64)
        assert_close(attention(q, k, v, sinks_N=sinks), factor * without, 1e-12)
    # of the first position, with one key: share of the key is σ(score − sink)
    sinks = torch.tensor([0.3, -0.4], dtype=torch.float64)
    score = (q[:, 0] * k[:, 0]).sum(-1) / 2
    out = attention(q, k, v, sinks_N=sinks)[:, 0]
    assert_close(out, v[:, 0] * torch.sigmoid(score - sinks).unsqueeze(-1), 1e-12)


@needs_native
def test_operators_are_well_formed_compile_and_differentiate_twice():
    inputs, d_out = make(12, 12, 4, 2, 8, torch.float32)
    q, k, v, sinks_N = inputs
    torch.library.opcheck(torch.ops.headway.attention.default, (q, k, v, None, sinks_N, 0.3))
    plain = [t.detach() for t in inputs]
    saved = torch.ops.headway.attention(*plain[:3], None, plain[3], 0.3)
    arguments = (d_out, *plain[:3], None, plain[3], *saved, 0.3)
    torch.library.opcheck(torch.ops.headway.attention_backward.default, arguments)
    compiled = torch.compile(attention, fullgraph=True)
    eager = run(attention, inputs, d_out, None, None, 0.3)
    for a, b in zip(run(compiled, inputs, d_out, None, None, 0.3), eager, strict=True):
        assert torch.equal(a, b)

    def curvature(function):
        out = function(q, k, v, sinks_N=sinks_N)
        grads = torch.autograd.grad(out, inputs, d_out, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), sinks_N)[0]

    assert_close(curvature(attention), curvature(attention_reference), 1e-5)
