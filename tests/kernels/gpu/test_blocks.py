"""The tables of blocks against the plain definition."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SIZES = st.lists(st.integers(0, 200), min_size=1, max_size=40)


def expected(counts: list[int], n_rows: int, block: int):
    starts = [sum(counts[:g]) for g in range(len(counts) + 1)]
    cut = [(g, r) for g, n in enumerate(counts) for r in range(starts[g], starts[g] + n, block)]
    return starts, cut, -(-n_rows // block) + len(counts)


def check(counts, extra, block, device, dtype):
    from headway.kernels.gpu.blocks import blocks

    found = blocks(torch.tensor(counts, dtype=dtype, device=device), sum(counts) + extra, block)
    starts, cut, B = expected(counts, sum(counts) + extra, block)
    assert all(t.dtype == torch.int32 for t in found)
    assert found.start_G.tolist() == starts
    assert len(cut) <= B == len(found.group_B) == len(found.row_B)
    groups = found.group_B.tolist()
    assert groups[: len(cut)] == [g for g, _ in cut] and set(groups[len(cut) :]) <= {-1}
    assert found.row_B.tolist()[: len(cut)] == [r for _, r in cut]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=SIZES, extra=st.integers(0, 90), block=st.sampled_from([16, 64, 128]), wide=st.booleans()
)
def test_every_row_is_in_one_block_of_its_group(device, counts, extra, block, wide):
    """`extra` rows belong to no group: slots without an expert."""
    check(counts, extra, block, device, torch.int64 if wide else torch.int32)


@pytest.mark.parametrize(
    "counts",
    [[0], [0, 0, 0], [1], [16], [17], [0, 500, 0], [64] * 8, [0] * 600 + [3] + [0] * 500 + [70]],
)
def test_edges(device, counts):
    check(counts, 0, 16, device, torch.int32)


@pytest.mark.slow
def test_as_many_groups_as_there_may_be(device):
    sizes = torch.randint(0, 3, (16 * 1024,), generator=torch.Generator().manual_seed(0))
    check(sizes.tolist(), 5, 16, device, torch.int32)
