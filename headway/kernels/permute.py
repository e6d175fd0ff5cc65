"""Sort (token, slot) pairs by (head, expert): stable, integer, the same on every run.

T tokens · H heads · E experts per head · K slots · R = T·H·K rows · N = T·H sub-tokens.
A slot is numbered (t·H + h)·K + k; its sub-token is slot // K. A slot whose index is E takes no
expert (dropped by a capacity, or a zero experts' slot): it sorts to the end, by head, past the last
offset.

The counting sort for H = 1, E = 3, K = 2 and three tokens:

    index   [2 0] [0 1] [2 0]          slots 0 … 5
    counts  [3, 1, 2]                  first pass: slots of each expert
    next    [0, 3, 4]                  exclusive sum: where an expert's rows begin
    row_NK  [4 0] [1 3] [5 2]          second pass: row = next[e]++ in the order of the slots
    slot_R  1 2 5 | 3 | 0 4            the inverse: stable within an expert"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.cpp import cpp_kernels, undispatched
from headway.kernels.differentiate import transformed
from headway.kernels.gpu import gpu_kernels
from headway.kernels.gpu.ops import sort_rows as sort_rows_gpu
from headway.kernels.precision import widen


class Rows(NamedTuple):
    """The permutation that sorts (token, slot) pairs by (head, expert); int64 (int32 on GPUs)."""

    slot_R: Tensor
    """`[R]`: sorted row → slot (t·H + h)·K + k, whose sub-token n is slot // K."""
    row_NK: Tensor
    """`[N, K]`: slot → sorted row; the inverse of `slot_R`."""
    counts_HE: Tensor
    """`[H, E]`: rows of each expert; slots without an expert are not counted."""


def count(key: Tensor, n_keys: int) -> Tensor:
    """Count each of 0 … n_keys − 1, int64 `[n_keys]`: a `bincount` of known shape."""
    key = key.flatten()
    none = torch.zeros(n_keys, dtype=torch.int64, device=key.device)
    return none.scatter_add(0, key, torch.ones_like(key))  # not in place: `vmap` cannot


def sort_rows(index_THK: Tensor, n_experts: int) -> Rows:
    """Sort all slots by (head, expert), stably: a counting sort in Triton on GPUs (int32 tables)
    and in C++ on CPUs, else a radix sort.

    Args: index_THK: int64 or int32 `[T, H, K]`; one outside 0 … E − 1 (E by convention) means that
    the slot takes no expert."""
    if transformed():
        return sort_rows_reference(index_THK, n_experts)
    if gpu_kernels().device == index_THK.device.type:
        return Rows(*sort_rows_gpu(index_THK, n_experts))
    if cpp_kernels().library is not None and index_THK.device.type == "cpu":
        return Rows(*(_sort if undispatched(index_THK) else _sort_op)(index_THK, n_experts))
    return sort_rows_reference(index_THK, n_experts)


def sort_rows_reference(index_THK: Tensor, n_experts: int) -> Rows:
    """Return what `sort_rows` does, with PyTorch's sort."""
    T, H, K = index_THK.shape
    head_H = torch.arange(H, device=index_THK.device).view(1, H, 1)
    # the sentinel E of head h must sort behind every head, not into head h + 1
    none_H = H * n_experts + head_H
    has_expert = (index_THK >= 0) & (index_THK < n_experts)
    key_THK = torch.where(has_expert, index_THK + head_H * n_experts, none_H)
    n_keys = H * (n_experts + 1)
    narrow = torch.int16 if n_keys <= 2**15 else torch.int32  # a radix sort over fewer bytes
    slot_R = torch.sort(key_THK.flatten().to(narrow), stable=True).indices
    row_NK = torch.empty_like(slot_R)
    row_NK[slot_R] = torch.arange(slot_R.numel(), device=slot_R.device)
    counts = count(key_THK, n_keys)[: H * n_experts]
    return Rows(slot_R, row_NK.view(T * H, K), counts.view(H, n_experts))


def _sort(index_THK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fields of `Rows`."""
    index_THK = index_THK.long().contiguous()
    out = _empty(index_THK, n_experts)
    cpp_kernels().call("sort_rows", torch.float32, index_THK, *index_THK.shape, n_experts, *out)
    return out


_sort_op = torch.library.custom_op("headway::sort_rows", _sort, mutates_args=())


@_sort_op.register_fake
def _(index_THK, n_experts):
    return _empty(index_THK, n_experts)


def _empty(index_THK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    (T, H, K), make = index_THK.shape, index_THK.new_empty
    sizes = ((T * H * K,), (T * H, K), (H, n_experts))
    slot_R, row_NK, counts_HE = (make(size, dtype=torch.int64) for size in sizes)
    return slot_R, row_NK, counts_HE


def drop_over_capacity(index_THK: Tensor, n_experts: int, capacity: int) -> Tensor:
    """Replace by E every slot beyond its expert's first `capacity` rows (in token, then slot
    order); int64 `[T, H, K]`."""
    rows = sort_rows(index_THK, n_experts)
    starts = rows.counts_HE.flatten().cumsum(0) - rows.counts_HE.flatten()
    T, H, K = index_THK.shape
    group = index_THK + torch.arange(H, device=index_THK.device).view(1, H, 1) * n_experts
    taken = index_THK < n_experts
    start_THK = starts[group.clamp(max=H * n_experts - 1)]
    rank_THK = rows.row_NK.view(T, H, K) - start_THK
    return torch.where(taken & (rank_THK < capacity), index_THK, n_experts)


def sum_slots(y_RL: Tensor, row_NK: Tensor, weight_NK: Tensor | None) -> Tensor:
    """Return out_n = Σ_k weight_nk · y[row_nk] in fixed order of k; `embedding_bag` fuses it."""
    N, K = row_NK.shape
    if y_RL.dtype in (torch.bfloat16, torch.float16) or y_RL.device.type != "cpu":
        y_NKL = widen(y_RL[row_NK])
        if weight_NK is not None:
            y_NKL = y_NKL * weight_NK.unsqueeze(-1)
        return y_NKL.sum(1).to(y_RL.dtype)
    starts = torch.arange(0, N * K, K, device=row_NK.device)
    weight = None if weight_NK is None else weight_NK.flatten().to(y_RL.dtype)
    return F.embedding_bag(row_NK.flatten(), y_RL, starts, mode="sum", per_sample_weights=weight)
