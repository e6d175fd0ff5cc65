"""Comparisons that every test shares."""

import torch
from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64 (the absolute error where want is 0)."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{tuple(got.shape)} against {tuple(want.shape)}"
    norm = torch.linalg.vector_norm(want)
    error = torch.linalg.vector_norm(got - want)
    return float(error / norm) if norm > 0 else float(error)


def assert_close(got: Tensor, want: Tensor, bound: float) -> None:
    """Fail unless the relative error is at most `bound`."""
    error = relative_error(got, want)
    assert error <= bound, f"relative error {error:.3g} exceeds {bound:.3g}"
