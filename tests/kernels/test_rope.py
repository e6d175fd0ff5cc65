import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from headway.config import RopeConfig
from headway.kernels import norm as norm_module
from headway.kernels import rope as module
from headway.kernels.norm import norm_rope, rms_norm_reference
from headway.kernels.rope import rope, rope_frequencies, rope_reference, rope_rows, rope_tables
from tests.compare import assert_close
from tests.kernels.cpp_paths import BOUND, NATIVE_DTYPES, needs_native, switch_off, threads


def test_equals_reference_with_gradient():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_tables(torch.arange(5), 8, 10_000.0, torch.float64)
    d_out = torch.randn_like(x)
    got = torch.autograd.grad(rope(x, cos, sin), x, d_out)[0]
    want = torch.autograd.grad(rope_reference(x, cos, sin), x, d_out)[0]
    assert_close(got, want, 1e-12)


def test_scores_depend_on_distance_only_and_norm_is_kept():
    q, k = (
        torch.randn(1, 1, 1, 8, dtype=torch.float64),
        torch.randn(1, 1, 1, 8, dtype=torch.float64),
    )

    def score(i, j):
        a = rope(q, *rope_tables(torch.tensor([i]), 8, 100.0, torch.float64))
        b = rope(k, *rope_tables(torch.tensor([j]), 8, 100.0, torch.float64))
        assert_close(torch.linalg.vector_norm(a), torch.linalg.vector_norm(q), 1e-12)
        return (a * b).sum()

    assert_close(score(9, 4), score(105, 100), 1e-10)
    assert abs(float(score(9, 4) - score(9, 5))) > 1e-6


def test_a_plane_turns_by_its_angle():
    """Pair (i, i + d/2) turns by position · theta^(−2i/d)."""
    cos, sin = rope_tables(torch.tensor([3]), 4, 100.0, torch.float64)
    out = rope(torch.tensor([1.0, 1.0, 0.0, 0.0]).double().view(1, 1, 1, 4), cos, sin).flatten()
    angle = torch.tensor([3.0, 3.0 / 10.0], dtype=torch.float64)
    assert_close(out, torch.cat((angle.cos(), angle.sin())), 1e-12)


def test_tables_are_float32_or_better():
    """A bfloat16 table would turn a vector by a wrong angle and shorten it."""
    exact = rope_tables(torch.arange(50), 8, 100.0, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        for got, want in zip(rope_tables(torch.arange(50), 8, 100.0, dtype), exact, strict=True):
            assert got.dtype == torch.float32
            assert_close(got, want, 1e-7)


def make(shape, dtype):
    torch.manual_seed(0)
    x, d_out = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    weight = (1 + torch.randn(shape[-1])).requires_grad_()
    return x, weight, d_out, rope_tables(torch.arange(shape[-3]), shape[-1], 100.0, dtype)


def run(x, weight, d_out, tables):
    """Of both operators: outputs, gradients of x, and that of the weight."""
    turned, both = rope(x, *tables), norm_rope(x, weight, 1e-6, *tables)
    dx = torch.autograd.grad(turned, x, d_out)[0]
    return turned, dx, both, *torch.autograd.grad(both, (x, weight), d_out)


def run_wide(x, weight, d_out, tables):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    cos, sin = (t.double() for t in tables)
    turned = rope_reference(x, cos, sin)
    both = rope_reference(rms_norm_reference(x, weight, 1e-6), cos, sin)
    dx = torch.autograd.grad(turned, x, d_out.double())[0]
    return turned, dx, both, *torch.autograd.grad(both, (x, weight), d_out.double())


SHAPES = [(2, 9, 6, 64), (9, 40, 1, 2), (3, 2, 5, 7, 18), (130, 2, 66), (4, 150, 3, 16)]


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("native_path", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_paths_equal_float64(shape, dtype, native_path, monkeypatch):
    if not native_path:
        switch_off(monkeypatch, module)
        switch_off(monkeypatch, norm_module)
    inputs = make(shape, dtype)
    got, want = run(*inputs), run_wide(*inputs)
    assert [t.dtype for t in got] == [dtype] * 4 + [torch.float32]
    for a, b in zip(got[:2], want[:2], strict=True):
        assert_close(a, b, BOUND[dtype])
    for a, b in zip(got[2:], want[2:], strict=True):  # two operators: the first rounds as well
        assert_close(a, b, BOUND[a.dtype] if native_path else 2 * BOUND[dtype])


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_the_same_bits_on_any_number_of_threads(dtype):
    inputs = make((3, 101, 5, 36), dtype)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(run(*inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_non_contiguous_inputs_and_an_expanded_gradient():
    x, weight, _, tables = make((2, 5, 3, 12), torch.float32)
    want = run(x, weight, torch.ones(2, 5, 3, 12), tables)
    far = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    tables_far = tuple(t.repeat_interleave(2, -1)[..., ::2] for t in tables)
    assert not far.is_contiguous() and not tables_far[0].is_contiguous()
    got = run(far, weight, torch.ones(()).expand(2, 5, 3, 12), tables_far)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_nan_and_inf_stay_in_their_row():
    x, weight, d_out, tables = make((1, 4, 1, 20), torch.float32)
    x.data[0, 1, 0, 18], x.data[0, 2, 0, 3] = torch.nan, torch.inf
    turned, _, both, dx, d_weight = run(x, weight, d_out, tables)
    assert turned[0, 1, 0, 18].isnan() and not turned[0, 2, 0, 3].isfinite()
    assert both[0, 1].isnan().all() and both[0, 2].isnan().any() and dx[0, 1:3].isnan().all()
    for t in (turned, both, dx):
        assert t[0, [0, 3]].isfinite().all()
    assert d_weight.isnan().all()


@needs_native
def test_are_well_formed_custom_operators():
    x, weight, d_out, tables = make((2, 4, 3, 20), torch.float32)
    ops = torch.ops.headway
    torch.library.opcheck(ops.rope.default, (x, *tables, 1.0))
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6, *tables))
    flat = (d_out, x.detach(), weight.detach(), torch.rand(2, 4, 3), *tables)
    torch.library.opcheck(ops.rms_norm_backward.default, flat)


@needs_native
def test_compiles_whole_and_equals_eager():
    x, weight, _, tables = make((2, 20, 3, 24), torch.float32)
    with torch.no_grad():
        compiled = torch.compile(norm_rope, fullgraph=True)(x, weight, 1e-6, *tables)
    assert torch.equal(compiled, norm_rope(x, weight, 1e-6, *tables))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [2, 6, 8])
def test_some_dims_or_neighbours(width, interleaved, dtype):
    config = RopeConfig(scaling="yarn", factor=4.0, original_max_len=32)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    d_out = torch.randn_like(x)
    results = []
    for function, d in ((rope, dtype), (rope_reference, torch.float64)):
        tables = rope_tables(torch.arange(5), width, 100.0, d, config)
        leaf = x.to(d).requires_grad_()
        y = function(leaf, *tables, interleaved)
        results.append((y, *torch.autograd.grad(y, leaf, d_out.to(d))))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(results[0][0][..., width:], x[..., width:].to(dtype))
    first, second = (0, 1) if interleaved else (0, width // 2)
    a, b = x[:, 3, :, first], x[:, 3, :, second]
    angle, factor = torch.tensor(3.0, dtype=torch.float64), config.table_factor  # frequency 1
    turned = factor * (a * angle.cos() - b * angle.sin())
    assert_close(results[1][0][:, 3, :, 0], turned, 1e-12)
    assert factor == pytest.approx(1 + 0.1 * math.log(4))


lengths = {"original_max_position_embeddings": st.sampled_from([16, 512, 4096])}
factors = {"factor": st.floats(1.5, 40.0)}
PARAMETERS = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), **factors}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(3.0, 8.0),
            **factors,
            **lengths,
        }
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), **factors, **lengths},
        optional={
            "beta_fast": st.floats(16.0, 48.0),
            "beta_slow": st.floats(0.5, 4.0),
            "truncate": st.booleans(),
            "attention_factor": st.floats(0.5, 2.0),
            "mscale": st.floats(0.5, 1.0),
            "mscale_all_dim": st.floats(0.5, 1.0),
        },
    ),
)


@settings(max_examples=60, deadline=None)
@given(PARAMETERS, st.sampled_from([8, 64]), st.sampled_from([1e4, 5e5]))
def test_scaling_equals_transformers(parameters, d_head, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    names = {"rope_type": "scaling", "original_max_position_embeddings": "original_max_len"}
    config = RopeConfig(**{names.get(name, name): value for name, value in parameters.items()})
    config.check(d_head, theta)
    theirs = transformers.LlamaConfig(
        head_dim=d_head,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    want, factor = ROPE_INIT_FUNCTIONS[config.scaling](theirs)
    assert_close(rope_frequencies(d_head, theta, config), want.double(), 2e-6)
    assert config.table_factor == pytest.approx(factor, rel=1e-12)


@needs_native
@pytest.mark.parametrize("scaling", ["none", "yarn"])
def test_rows_of_the_tables_depend_on_their_position_alone(scaling):
    config = RopeConfig(scaling=scaling, factor=4.0, original_max_len=64)
    position = torch.tensor([0, 1, 900_000, 77, 5, 123_456, 3])
    arguments = (6, 10_000.0, torch.bfloat16, config)
    rows = rope_rows(position, *arguments)
    for got, want in zip(rows, rope_tables(position, *arguments), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype == torch.float32
        assert_close(got, want, 1e-7)
    for i in range(len(position)):
        alone = rope_rows(position[i : i + 1], *arguments)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, rows, strict=True))
