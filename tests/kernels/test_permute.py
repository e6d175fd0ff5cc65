import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.permute import drop_over_capacity, sort_rows, sort_rows_reference
from tests.kernels.cpp_paths import needs_native


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(1, 6), st.data())
def test_rows_are_grouped_stable_and_invertible(T, H, E, data):
    K = data.draw(st.integers(1, E))
    index = torch.randint(0, E + 1, (T, H, K), generator=torch.Generator().manual_seed(T))
    rows = sort_rows(index, E)
    for ours, theirs in zip(rows, sort_rows_reference(index, E), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype == torch.int64
    # the plain definition: all slots of (h, e) in slot order, heads outermost, those without an expert last, by head
    slots = [(t * H + h) * K + k for t in range(T) for h in range(H) for k in range(K)]
    flat = index.flatten().tolist()
    grouped = [
        [s for s in slots if (s // K) % H == h and flat[s] == e] for h in range(H) for e in range(E)
    ]
    without = [s for h in range(H) for s in slots if (s // K) % H == h and flat[s] == E]
    assert rows.slot_R.tolist() == [s for group in grouped for s in group] + without
    assert rows.counts_HE.flatten().tolist() == [len(group) for group in grouped]
    assert rows.row_NK.flatten()[rows.slot_R].tolist() == list(range(T * H * K))


def test_more_groups_than_int16_holds():
    index = torch.tensor([[[0], [4000]], [[3999], [1]]]).repeat(1, 10, 1)[:, :20]
    rows = sort_rows(index, 4001)
    keys = index.flatten() + (torch.arange(index.numel()) % index.shape[1]) * 4001
    assert torch.equal(rows.slot_R, torch.sort(keys, stable=True).indices)


def test_an_index_that_is_no_expert_sorts_behind_all_experts():
    index = torch.tensor([[[0, -1]], [[5, 1]]])
    for rows in (sort_rows(index, 3), sort_rows_reference(index, 3)):
        assert rows.counts_HE.tolist() == [[1, 1, 0]] and rows.slot_R.tolist() == [0, 3, 1, 2]


@needs_native
def test_is_a_well_formed_custom_operator():
    torch.library.opcheck(
        torch.ops.headway.sort_rows.default, (torch.tensor([[[0, 3], [1, 2]]]), 3)
    )


def test_capacity_keeps_the_first_rows():
    index = torch.tensor([[[0, 1]], [[0, 2]], [[0, 1]], [[1, 0]]])
    kept = drop_over_capacity(index, 3, 2)
    assert kept.tolist() == [[[0, 1]], [[0, 2]], [[3, 1]], [[3, 3]]]
    assert torch.equal(drop_over_capacity(index, 3, 4), index)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6))
def test_no_expert_exceeds_its_capacity(T, H, E, capacity):
    index = torch.randint(0, E, (T, H, 1), generator=torch.Generator().manual_seed(T * H))
    kept = sort_rows(drop_over_capacity(index, E, capacity), E).counts_HE
    assert torch.equal(kept, sort_rows(index, E).counts_HE.clamp(max=capacity))
