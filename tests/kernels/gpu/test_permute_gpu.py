"""The row sort's Triton kernels beside the reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.kernels.permute import Rows, drop_over_capacity, sort_rows, sort_rows_reference


def check(index, n_experts) -> Rows:
    got, want = sort_rows(index, n_experts), sort_rows_reference(index.long(), n_experts)
    for name in ("slot_R", "row_NK", "counts_HE"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == torch.int32 and torch.equal(a.long(), b), name
    return got


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.data())
def test_equals_the_reference(device, T, H, E, narrow, data):
    K = data.draw(st.integers(1, E))
    index = torch.randint(0, E + 1, (T, H, K), generator=torch.Generator().manual_seed(T))
    check(index.to(device, torch.int32 if narrow else torch.int64), E)


@pytest.mark.parametrize("T, H, K, E", [(700, 2, 3, 9), (600, 1, 4, 1), (50, 2, 2, 3000)])
def test_several_tiles(T, H, K, E, device):
    index = torch.randint(0, E + 1, (T, H, K), device=device)
    check(index, E)


def test_one_expert_takes_all_and_the_others_none(device):
    rows = check(torch.full((300, 2, 1), 3, device=device), 5)
    assert rows.counts_HE.tolist() == [[0, 0, 0, 300, 0]] * 2


def test_non_contiguous_index_and_two_runs(device):
    index = torch.randint(0, 6, (3, 90, 2), device=device).permute(1, 2, 0)
    first, second = check(index, 5), check(index, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_index_that_is_no_expert_takes_none(device):
    got = sort_rows(torch.tensor([[[-1, 0]], [[7, 1]]], device=device), 2)
    assert got.slot_R.tolist() == [1, 3, 0, 2] and got.counts_HE.tolist() == [[1, 1]]


@pytest.mark.parametrize("T, H, K, E", [(65536, 8, 8, 64), (65536, 8, 8, 1024), (4096, 1, 2, 8)])
def test_the_table_of_places_is_small(T, H, K, E, device, monkeypatch):
    """About half as large as `slot_R` at most; every slot belongs to one tile."""
    from headway.kernels.gpu import permute as kernels

    made = []
    monkeypatch.setattr(kernels, "_walk", _Grid(made))
    index = torch.empty(T, H, K, dtype=torch.int32, device="meta")
    kernels.sort_rows(index, E)
    (tiles, place, steps), _ = made
    assert place.numel() <= 0.51 * index.numel() + H * (E + 1)
    assert (tiles - 1) * steps * kernels.STEP < T * K <= tiles * steps * kernels.STEP


class _Grid:
    """In place of the kernel: notes how it would be launched."""

    def __init__(self, made: list) -> None:
        self.made = made

    def __getitem__(self, grid):
        def launch(index, place, slot_R, row_NK, TK, H, E, K, steps, tiles, **_):
            assert grid == (tiles, H) and place.shape == (H * (E + 1), tiles)
            self.made.append((tiles, place, steps))

        return launch


def test_capacity_keeps_the_first_rows(device):
    index = torch.tensor([[[0, 1]], [[0, 2]], [[0, 1]], [[1, 0]]], device=device)
    for narrow in (index, index.int()):
        assert drop_over_capacity(narrow, 3, 2).tolist() == [[[0, 1]], [[0, 2]], [[3, 1]], [[3, 3]]]


def test_is_a_well_formed_custom_operator(device):
    arguments = (torch.tensor([[[0, 3], [1, 2]]], device=device), 3)
    torch.library.opcheck(torch.ops.headway.sort_rows_gpu.default, arguments)
