"""Packed weights: products against float64, the same bits for a row whatever is beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels import packed as module
from headway.kernels.packed import (
    batch_invariant,
    explain,
    pack,
    packed_linear,
    packed_linear_reference,
    packed_rows,
)
from tests.compare import assert_close
from tests.kernels.cpp_paths import BOUND, NATIVE_DTYPES, needs_native, switch_off, threads

CPU = torch.device("cpu")


def tensors(rows: int, K: int, N: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=generator).to(dtype)
    return x, torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, K, N", [(1, 1, 1), (3, 7, 5), (1, 64, 200), (7, 300, 64), (400, 33, 81)]
)
def test_a_product_is_that_of_the_reference(dtype, stored, rows, K, N):
    x, w, b = tensors(rows, K, N, dtype)
    w = w.to(stored)
    want = packed_linear_reference(x.double(), w.to(dtype).double(), b.double())
    packed = pack(w, dtype, b)
    assert packed.batch_invariant
    got = packed_linear(x, packed)
    assert got.dtype == dtype and got.shape == (rows, N)
    assert_close(got, want, BOUND[dtype])
    wide = packed_linear(x, packed, wide=True)
    assert wide.dtype == torch.float32
    assert_close(wide, want, 1e-5)


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_a_matrix_per_head(dtype):
    x = torch.randn(9, 3, 10).to(dtype)
    w, b = torch.randn(3, 70, 10), torch.randn(3, 70)
    want = packed_linear_reference(x.double(), w.to(dtype).double(), b.double())
    assert_close(packed_linear(x, pack(w, dtype, b)), want, BOUND[dtype])


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NATIVE_DTYPES),
    st.integers(1, 240),
    st.integers(1, 150),
    st.integers(1, 200),
    st.booleans(),
    st.integers(0, 1000),
)
def test_a_row_does_not_see_the_others(dtype, rows, K, N, narrow, seed):
    x, w, b = tensors(rows, K, N, dtype, seed)
    packed = pack(w.bfloat16() if narrow else w, dtype, b)
    assert packed.narrow == (narrow and dtype is torch.float32)
    together = packed_linear(x, packed)
    with threads(2):
        assert torch.equal(packed_linear(x, packed), together)
    at = seed % rows
    assert torch.equal(packed_linear(x[at], packed), together[at])
    assert torch.equal(packed_linear(x[at:], packed), together[at:])


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("K", [7, 32])
def test_rows_come_back_as_they_were(dtype, K):
    _, w, _ = tensors(1, K, 90, dtype)
    index = torch.tensor([[89, 0], [64, 63]])
    assert torch.equal(packed_rows(pack(w, dtype), index), w.to(dtype)[index])
    narrow = w.bfloat16()
    assert torch.equal(packed_rows(pack(narrow, dtype), index), narrow.to(dtype)[index])
    for wrong in (-1, 90):
        with pytest.raises(IndexError, match="0 … 89"):
            packed_rows(pack(w, dtype), torch.tensor([3, wrong]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_without_kernels_the_same_numbers_from_pytorch(monkeypatch, dtype):
    switch_off(monkeypatch, module)
    assert not batch_invariant(CPU, dtype) and "switched off by a test" in explain(CPU, dtype)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4e-3)
    x, w, b = tensors(5, 30, 20, dtype)
    packed = pack(w, dtype, b)
    want = packed_linear_reference(x.double(), w.to(dtype).double(), b.double())
    assert not packed.batch_invariant
    assert_close(packed_linear(x, packed), want, bound)
    assert packed_linear(x, packed, wide=True).dtype in (torch.float32, torch.float64)
    assert_close(packed_linear(x, packed, wide=True), want, min(bound, 1e-5))
    index = torch.tensor([3, 19])
    assert torch.equal(packed_rows(packed, index), w.to(dtype)[index])
    heads = pack(w.view(2, 10, 30), dtype, b)
    both = torch.stack((x, x), 1)
    want = packed_linear_reference(
        both.double(), w.view(2, 10, 30).to(dtype).double(), b.view(2, 10).double()
    )
    assert_close(packed_linear(both, heads), want, bound)


@needs_native
def test_which_path_is_said():
    assert "batch-invariant: float32" in explain(CPU, torch.float32)
    assert "not batch-invariant" in explain(CPU, torch.float16)
    assert "not on cuda" in explain(torch.device("cuda"), torch.float32)
