"""The norm over all gradients."""

import pytest
import torch

from headway.parallel.reduce import ROW, total_norm


def test_the_norm_of_many_small_numbers():
    """torch's own is 2e-4 too small here: a float32 sum of 2²³ squares loses the last of them."""
    x = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
    assert float(total_norm([x])) == pytest.approx(float(x.double().norm()), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shapes(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (ROW + 5,), (2, ROW), (7, 9, 11), (0, 4)]
    tensors = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    tensors.append(torch.randn(50, 200, generator=generator, dtype=dtype).T)
    norm = total_norm(tensors)
    assert norm.dtype == torch.float64
    expected = float(torch.cat([x.flatten().double() for x in tensors]).norm())
    assert float(norm) == pytest.approx(expected, rel=1e-15 if dtype == torch.float64 else 1e-7)
    assert float(total_norm([])) == 0.0
