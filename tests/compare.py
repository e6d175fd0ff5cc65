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


def assert_close(got: Tensor, want: Tensor, bound: float, typical: float = 0.0) -> None:
    """Fail unless the relative error is at most `bound`. Where the entries of `want` are sums that may
    cancel, `typical` is the norm to expect without luck, and the error is relative to it at least.
    """
    error = relative_error(got, want)
    norm = float(torch.linalg.vector_norm(want.detach().double()))
    if 0 < norm < typical:
        error *= norm / typical
    assert error <= bound, f"relative error {error:.3g} exceeds {bound:.3g}"
