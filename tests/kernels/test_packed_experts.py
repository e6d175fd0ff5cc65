"""Packed experts: those of `experts` bit for bit, float64 within tolerance, and the same bits for a
sub-token whatever is beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import n_inputs
from headway.kernels.experts import experts, experts_reference
from headway.kernels.packed_experts import pack_experts, packed_experts
from headway.kernels.permute import sort_rows
from tests.compare import assert_close
from tests.kernels.cpp_paths import NATIVE_DTYPES, needs_native, threads

pytestmark = needs_native
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-3}


def make(T, H, E, K, L, F, dtype, activation="swiglu", seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, L, generator=g).to(dtype)
    gate = torch.rand(T, H, K, generator=g)
    index = torch.stack([torch.randperm(E + 1, generator=g)[:K] for _ in range(T * H)])
    w_in = torch.randn(H, E, n_inputs(activation), F, L, generator=g) / L**0.5
    w_out = torch.randn(H, E, F, L, generator=g) / F**0.5
    return x, gate, index.view(T, H, K), w_in, w_out


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["swiglu", "relu2", "gelu"])
@pytest.mark.parametrize(
    "T, H, E, K, L, F",
    [(1, 1, 4, 2, 64, 96), (23, 2, 5, 3, 9, 7), (9, 3, 4, 1, 64, 64), (300, 1, 2, 2, 33, 70)],
)
def test_equal_to_experts_bit_for_bit(dtype, stored, activation, T, H, E, K, L, F):
    x, gate, index, w_in, w_out = make(T, H, E, K, L, F, dtype, activation)
    w_in, w_out = w_in.to(stored), w_out.to(stored)
    flat = (x.flatten(0, 1), gate.flatten(0, 1))
    want = experts(*flat, sort_rows(index, E), w_in, w_out, activation).view(x.shape)
    got = packed_experts(x, gate, index, pack_experts(w_in, w_out, activation, dtype))
    assert torch.equal(got, want)
    if T < 50:
        weights = (w.to(dtype).double() for w in (w_in, w_out))
        flat = (x.flatten(0, 1).double(), gate.flatten(0, 1).double(), index)
        exact = experts_reference(*flat, *weights, activation).view(x.shape)
        assert_close(got, exact, BOUNDS[dtype])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NATIVE_DTYPES),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 80),
    st.integers(1, 70),
    st.integers(0, 1000),
)
def test_a_token_does_not_see_the_others(dtype, T, H, L, F, seed):
    x, gate, index, w_in, w_out = make(T, H, 4, 2, L, F, dtype, seed=seed)
    packed = pack_experts(w_in, w_out, "swiglu", dtype)
    together = packed_experts(x, gate, index, packed)
    with threads(2):
        assert torch.equal(packed_experts(x, gate, index, packed), together)
    at = seed % T
    assert torch.equal(packed_experts(x[at:], gate[at:], index[at:], packed), together[at:])
    alone = packed_experts(x[at : at + 1], gate[at : at + 1], index[at : at + 1], packed)
    assert torch.equal(alone[0], together[at])


@pytest.mark.parametrize("narrow", ["in", "out"])
def test_weights_of_two_dtypes_are_not_rounded(narrow):
    x, gate, index, w_in, w_out = make(6, 2, 4, 2, 16, 16, torch.float32)
    if narrow == "in":
        w_in = w_in.bfloat16()
    else:
        w_out = w_out.bfloat16()
    wide = pack_experts(w_in.float(), w_out.float(), "swiglu", torch.float32)
    packed = pack_experts(w_in, w_out, "swiglu", torch.float32)
    assert torch.equal(packed_experts(x, gate, index, packed), packed_experts(x, gate, index, wide))


def test_indices_that_count_the_experts_of_all_heads():
    x, gate, index, w_in, w_out = make(6, 2, 4, 2, 16, 16, torch.float32)
    packed = pack_experts(w_in, w_out, "swiglu", torch.float32)
    want = packed_experts(x, gate, index, packed)
    all_of_them = torch.where(index < 4, index + 4 * torch.arange(2).view(1, 2, 1), 8)
    flat = (t.flatten(0, 1).unsqueeze(1) for t in (x, gate, all_of_them))
    assert torch.equal(packed_experts(*flat, packed).view(x.shape), want)
    assert packed.expert_bytes == 4 * 3 * 16 * 16
    narrow = pack_experts(w_in.bfloat16(), w_out.bfloat16(), "swiglu", torch.float32)
    assert narrow.expert_bytes == 2 * 3 * 16 * 16
