"""Several tensors are packed into one message."""

import pytest
import torch

from headway.parallel.collectives import _Packing


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_a_message_of_any_number_of_rows_is_unpacked(n):
    """Also of one row or none, where the slice of a part is not aligned to its numbers."""
    parts = (
        torch.randn(n, 3, 4).bfloat16(),
        torch.arange(n, dtype=torch.int16).view(n, 1),
        torch.randn(n, 1),
    )
    packing = _Packing(parts)
    rows = packing.pack(parts)
    assert rows.shape == (n, 24 + 2 + 4)
    for unpacked, part in zip(packing.unpack(rows), parts, strict=True):
        assert unpacked.dtype == part.dtype and torch.equal(unpacked, part)
