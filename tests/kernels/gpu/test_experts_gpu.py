"""The fused kernels against the plain loops in float64: output and every gradient."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from headway.kernels.experts import experts
from headway.kernels.paths import GPU_ACTIVATIONS, ExpertInputs, choose_path, path_of
from headway.kernels.permute import Rows, sort_rows_reference
from headway.model.layers import MultiHeadLatentMoE
from tests.compare import assert_close, relative_error
from tests.kernels.test_experts import make, reference

BF16, F32 = torch.bfloat16, torch.float32
BOUNDS = {F32: (1e-5, 1e-5), BF16: (3e-3, 5e-3)}
"""Of the output and of every gradient."""


def tables(index, E) -> Rows:
    """int32, as the GPU's own sort makes them."""
    return Rows(*(t.int() for t in sort_rows_reference(index, E)))


def draw(device, T, H, E, K, L, F, activation, dtype, seed=0, scale=1.0):
    """Tokens in `dtype`, gates and weights in float32 that hold values of `dtype`."""
    inputs, index, d_out = make(T, H, E, K, L, F, activation, dtype, seed, scale)
    wide = [t.detach().to(device).float().requires_grad_() for t in inputs[1:]]
    x = inputs[0].detach().to(device).requires_grad_()
    return (x, *wide), index.to(device), d_out.to(dtype).to(device)


def run(inputs, index, activation, d_out):
    rows = tables(index, inputs[2].shape[1])
    assert path_of(ExpertInputs(*inputs, *rows, activation)) == "fused"
    out = experts(inputs[0], inputs[1], rows, *inputs[2:], activation)
    return out, torch.autograd.grad(out, inputs, d_out)


def compare(inputs, index, activation, d_out, found=None):
    """Every result within the bound of its dtype."""
    out, grads = found or run(inputs, index, activation, d_out)
    expected, expected_grads = reference(inputs, index, activation, d_out.double())
    of_out, of_grads = BOUNDS[inputs[0].dtype]
    assert out.dtype == inputs[0].dtype and grads[2].dtype == inputs[2].dtype
    assert_close(out, expected, of_out)
    # a gate's gradient is one scalar product ⟨do, y⟩, which may nearly cancel
    ungated = expected.detach().norm() / inputs[1].detach().double().square().mean().sqrt()
    typical = float(d_out.double().norm() * ungated) / max(out.numel(), 1) ** 0.5
    for i, (got, want) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_close(got, want, of_grads, typical if i == 1 else 0.0)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("activation", GPU_ACTIVATIONS)
@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0, 3.0])
def test_within_tolerance_at_any_scale(device, dtype, activation, scale):
    compare(*_case(device, 40, 1, 4, 2, 32, 16, activation, dtype, scale=scale))


def _case(device, T, H, E, K, L, F, activation, dtype, **more):
    inputs, index, d_out = draw(device, T, H, E, K, L, F, activation, dtype, **more)
    return inputs, index, activation, d_out


@pytest.mark.parametrize("K", [1, 2, 3, 4, 6, 8])
def test_any_number_of_slots(device, K):
    compare(*_case(device, 12, 2, 9, K, 32, 16, "swiglu", BF16))


@pytest.mark.parametrize(
    ("L", "F"),
    [
        (16, 16),
        (32, 80),
        (48, 48),
        (64, 112),
        (96, 32),
        (128, 144),
        (208, 16),
        (256, 32),
        (288, 48),
        (384, 16),
        (512, 32),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_widths_that_no_tile_divides(device, L, F, dtype):
    compare(*_case(device, 20, 1, 3, 2, L, F, "swiglu", dtype))


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_wide_heads_with_one_input(device, activation):
    compare(*_case(device, 70, 1, 2, 1, 320, 48, activation, BF16))


def test_more_rows_than_a_tile_in_one_expert_and_none_in_others(device):
    inputs, _, d_out = draw(device, 300, 1, 4, 1, 32, 32, "gelu", F32)
    index = torch.full((300, 1, 1), 2, device=device)
    out, grads = run(inputs, index, "gelu", d_out)
    compare(inputs, index, "gelu", d_out, (out, grads))
    assert (grads[2][:, [0, 1, 3]] == 0).all() and (grads[3][:, [0, 1, 3]] == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_slots_without_an_expert_add_nothing(device, dtype):
    inputs, index, d_out = draw(device, 18, 2, 5, 3, 32, 16, "swiglu", dtype)
    index[::2, :, 1] = 5
    index[3] = 5
    out, grads = run(inputs, index, "swiglu", d_out)
    compare(inputs, index, "swiglu", d_out, (out, grads))
    assert (out.view(18, 2, 32)[3] == 0).all() and (grads[1].view(18, 2, 3)[3] == 0).all()


def test_no_slot_has_an_expert(device):
    inputs, index, d_out = draw(device, 5, 1, 3, 2, 32, 16, "swiglu", F32)
    out, grads = run(inputs, torch.full_like(index, 3), "swiglu", d_out)
    assert (out == 0).all() and all((g == 0).all() for g in grads)


def test_zero_tokens(device):
    inputs, index, d_out = draw(device, 0, 2, 4, 3, 32, 16, "swiglu", BF16)
    out, grads = run(inputs, index, "swiglu", d_out)
    assert out.shape == (0, 32) and grads[0].shape == (0, 32)
    assert (grads[2] == 0).all() and (grads[3] == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("activation", GPU_ACTIVATIONS)
def test_nan_and_inf_reach_their_token_and_no_other(device, dtype, activation):
    """Widths with padding, where inf · 0 would be NaN."""
    inputs, index, _ = draw(device, 8, 1, 3, 2, 48, 48, activation, dtype)
    x, gate, w_in, w_out = (t.detach() for t in inputs)
    x[2, 1], x[4, 0] = torch.nan, torch.inf
    out = experts(x, gate, tables(index, 3), w_in, w_out, activation)
    assert out[2].isnan().all() and not out[4].isfinite().any()
    assert out[[0, 1, 3, 5, 6, 7]].isfinite().all()


def test_nan_in_the_gradient_reaches_the_tokens_gradient_and_no_other(device):
    inputs, index, d_out = draw(device, 8, 1, 3, 2, 48, 48, "swiglu", BF16)
    d_out[3, 5] = torch.nan
    _, grads = run(inputs, index, "swiglu", d_out)
    others = [0, 1, 2, 4, 5, 6, 7]
    for got in grads[:2]:
        assert got[3].isnan().all() and got[others].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_non_contiguous_tensors(device, dtype):
    inputs, index, d_out = draw(device, 9, 2, 4, 2, 32, 16, "swiglu", dtype)
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in inputs]
    assert not strided[0].is_contiguous()
    found = run(strided, index, "swiglu", d_out.repeat_interleave(2, -1)[..., ::2])
    expected = run(inputs, index, "swiglu", d_out)
    for got, want in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(got, want)
    ones = run(inputs, index, "swiglu", torch.ones_like(d_out))[1]
    expanded = run(
        inputs, index, "swiglu", torch.ones((), device=device, dtype=dtype).expand_as(d_out)
    )[1]
    assert all(torch.equal(a, b) for a, b in zip(ones, expanded, strict=True))


def test_int64_tables_give_the_same_bits(device):
    inputs, index, d_out = draw(device, 20, 2, 4, 2, 32, 16, "swiglu", BF16)
    narrow = run(inputs, index, "swiglu", d_out)
    out = experts(inputs[0], inputs[1], sort_rows_reference(index, 4), *inputs[2:], "swiglu")
    grads = torch.autograd.grad(out, inputs, d_out)
    for a, b in zip((narrow[0], *narrow[1]), (out, *grads), strict=True):
        assert torch.equal(a, b)


def test_two_runs_and_a_checkpoint_give_the_same_bits(device):
    inputs, index, d_out = draw(device, 60, 2, 4, 3, 32, 32, "swiglu", BF16)
    rows = tables(index, 4)

    def call(x, gate, w_in, w_out):
        return experts(x, gate, rows, w_in, w_out, "swiglu")

    first, second = run(inputs, index, "swiglu", d_out), run(inputs, index, "swiglu", d_out)
    out = checkpoint(call, *inputs, use_reentrant=False)
    third = (out, torch.autograd.grad(out, inputs, d_out))
    for other in (second, third):
        for a, b in zip((first[0], *first[1]), (other[0], *other[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("L", [48, 288])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_weights_stored_in_bfloat16(device, dtype, L):
    """Nothing is cast; the same bits in forward, gradients rounded once to the weights' own dtype."""
    (x, gate, *weights), index, d_out = draw(device, 40, 2, 4, 2, L, 32, "swiglu", dtype)
    weights = [w.detach().bfloat16().float().requires_grad_() for w in weights]
    wide = run((x, gate, *weights), index, "swiglu", d_out)
    narrow = [w.detach().bfloat16().requires_grad_() for w in weights]
    out, grads = run((x, gate, *narrow), index, "swiglu", d_out)
    assert torch.equal(out, wide[0])
    assert [g.dtype for g in grads] == [dtype, F32, BF16, BF16]
    for got, want in zip(grads, wide[1], strict=True):
        assert torch.equal(got, want.to(got.dtype))


def test_gates_in_bfloat16(device):
    (x, gate, *weights), index, d_out = draw(device, 20, 1, 4, 2, 32, 16, "gelu", BF16)
    rounded = gate.detach().bfloat16()
    want = run((x, rounded.float().requires_grad_(), *weights), index, "gelu", d_out)
    out, grads = run((x, rounded.requires_grad_(), *weights), index, "gelu", d_out)
    assert torch.equal(out, want[0])
    for got, w in zip(grads, want[1], strict=True):
        assert torch.equal(got, w.to(got.dtype))


@pytest.mark.parametrize("L", [32, 512])
def test_saves_tokens_gates_and_tables_alone(device, L):
    """2·L bytes per sub-token and 12 per slot; the weights are saved as they are."""
    T, H, E, K, F = 30, 2, 4, 3, 64
    inputs, index, _ = draw(device, T, H, E, K, L, F, "swiglu", BF16)
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        experts(inputs[0], inputs[1], tables(index, E), *inputs[2:], "swiglu", recompute=True)
    weights = {t.data_ptr() for t in inputs[2:]}
    assert weights <= set(saved)
    found = sum(size for place, size in saved.items() if place not in weights)
    assert found == T * H * (2 * L + 12 * K) + 4 * H * E


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    T=st.integers(1, 40),
    H=st.integers(1, 3),
    E=st.integers(1, 7),
    L=st.sampled_from([16, 32, 48, 64]),
    F=st.sampled_from([16, 32, 48]),
    data=st.data(),
    activation=st.sampled_from(GPU_ACTIVATIONS),
    dtype=st.sampled_from([F32, BF16]),
    drop=st.booleans(),
)
def test_equals_loops_at_any_size(device, T, H, E, L, F, data, activation, dtype, drop):
    K = data.draw(st.integers(1, E))
    inputs, index, d_out = draw(device, T, H, E, K, L, F, activation, dtype, seed=T + 10 * E)
    if drop:
        index[1::2, :, 0] = E
    found = run(inputs, index, activation, d_out)
    if T * H >= 8 or dtype == F32:  # of a few values the error may be 1.5 times the usual one
        compare(inputs, index, activation, d_out, found)
    expected, _ = reference(inputs, index, activation, d_out.double())
    assert relative_error(found[0], expected) <= 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4096, 16384])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_weight_gradient_of_many_rows(device, rows, scale):
    """The published reversal trick loses 85% here; one float32 accumulation does not."""
    inputs, _, d_out = draw(device, rows, 1, 1, 1, 32, 16, "gelu", BF16, scale=scale)
    out, grads = run(
        inputs, torch.zeros(rows, 1, 1, dtype=torch.int64, device=device), "gelu", d_out
    )
    wide = [t.detach().double().requires_grad_() for t in inputs]
    pre = wide[0] @ wide[2][0, 0, 0].T
    expected = wide[1] * (torch.nn.functional.gelu(pre) @ wide[3][0, 0])
    expected_grads = torch.autograd.grad(expected, wide, d_out.double())
    assert relative_error(out, expected) < 3e-3
    for got, want in zip(grads, expected_grads, strict=True):
        assert relative_error(got, want) < 5e-3


@pytest.mark.parametrize("L", [32, 272])
def test_are_well_formed_custom_operators(device, L):
    """Narrow experts keep nothing of size R×F, wide ones their pre-activations."""
    inputs, index, d_out = draw(device, 6, 2, 3, 2, L, 16, "swiglu", F32)
    rows = tables(index, 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward = torch.ops.headway.experts.default
    torch.library.opcheck(forward, (*inputs, *rows, "swiglu", True), test_utils=tests)
    plain = [t.detach() for t in inputs]
    _, pre = forward(*plain, *rows, "swiglu", True)
    assert pre.shape == (0 if L == 32 else 24, 32)
    backward = torch.ops.headway.experts_backward.default
    torch.library.opcheck(backward, (d_out, *plain, *rows, pre, "swiglu", True), test_utils=tests)


def test_the_path_is_chosen_by_dtype(device):
    """Any width: narrow and wide experts have kernels of their own."""
    for dtype in (BF16, F32):
        for L, F in ((64, 64), (1024, 64), (40, 24), (7, 3)):
            assert choose_path(device.type, dtype, L, F) == "fused"
    assert choose_path(device.type, torch.float64, 64, 64) == "loop"
    inputs, index, _ = draw(device, 4, 1, 3, 2, 32, 16, "swiglu", BF16)
    half = (*inputs[:2], *(w.half() for w in inputs[2:]))
    assert path_of(ExpertInputs(*half, *tables(index, 3), "swiglu")) == "loop"


def test_backward_changes_over_between_two_forward_widths(device, monkeypatch):
    """L 256: narrow kernels forward, wide ones backward."""
    from headway.kernels.gpu import experts_narrow, experts_wide

    def refuse(*args):
        raise AssertionError("not the kernels for this width")

    monkeypatch.setattr(experts_narrow, "backward", refuse)
    monkeypatch.setattr(experts_wide, "forward", refuse)
    compare(*_case(device, 20, 1, 3, 2, 256, 32, "swiglu", BF16))
    monkeypatch.undo()
    monkeypatch.setattr(experts_wide, "forward", refuse)
    monkeypatch.setattr(experts_wide, "backward", refuse)
    compare(*_case(device, 20, 1, 3, 2, 128, 32, "swiglu", BF16))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_layer_equals_the_eager_one(device, recompute):
    """One graph, no break; aot_eager needs no compiler."""
    torch.manual_seed(0)
    layer = MultiHeadLatentMoE(32, 2, 4, 2, 16, recompute=recompute).to(device)
    x = torch.randn(10, 32, device=device, requires_grad=True)
    d_out = torch.randn(10, 32, device=device)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out, _ = call(x)
        results.append((out, *torch.autograd.grad(out, [x, *layer.parameters()], d_out)))
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, 1e-6)
