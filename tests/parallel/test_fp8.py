"""Rows in eight bits: how far off, whatever their scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.parallel.fp8 import narrow, widen
from tests.compare import relative_error


def there_and_back(x):
    value, scale = narrow(x)
    assert value.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert scale.shape == (*x.shape[:-1], 1)
    return widen(value, scale, x.dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 65),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_value_is_off_by_a_sixteenth_at_most(rows, width, exponent, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=g) * 2.0**exponent).to(dtype)
    restored, largest = there_and_back(x), x.abs().amax(-1, keepdim=True)
    # below 2⁻⁶ of the grid e4m3 is evenly spaced: 2⁻⁹ of 448 apart
    bound = torch.maximum(x.abs() / 16, largest / 448 / 2**10) * 1.01
    assert bool(((restored - x).abs() <= bound).all())


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_error_does_not_depend_on_the_scale(scale):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * scale
    assert 0.02 < relative_error(there_and_back(x), x) < 0.03


def test_zeros_stay_and_what_is_not_finite_marks_its_row():
    x = torch.ones(4, 8)
    x[0] = 0
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    restored = there_and_back(x)
    assert torch.equal(restored[[0, 3]], x[[0, 3]])
    assert bool(restored[1:3].isnan().any(-1).all())


def test_no_rows_give_no_rows():
    assert there_and_back(torch.zeros(0, 2, 16)).shape == (0, 2, 16)
