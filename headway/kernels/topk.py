"""Exact top-k whose ties go to the lowest index.

T tokens · H heads · E experts · K chosen. `torch.topk` leaves the order of ties open, so two devices, or two runs, may
route a token differently. Here a float32 score and its index are packed into one int64 key: keys are unique, so the
order is total, and one integer `topk` gives it.
"""

import torch
from torch import Tensor


def top_k_reference(scores_THE: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, best first, ties to the lowest index; int64 `[..., k]`. NaN counts as largest."""
    return torch.sort(scores_THE, dim=-1, descending=True, stable=True).indices[..., :k]


def top_k(scores_THE: Tensor, k: int) -> Tensor:
    """Equal to `top_k_reference` for every input. Float32 takes the packed path; other dtypes take the reference."""
    if scores_THE.dtype != torch.float32:
        return top_k_reference(scores_THE, k)
    n_experts = scores_THE.shape[-1]
    scores = scores_THE.detach() + 0.0  # -0.0 becomes 0.0, as they are equal
    bits = torch.where(scores.isnan(), torch.nan, scores).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integer order = float order
    lowest_first = torch.arange(n_experts - 1, -1, -1, device=scores.device)
    keys = (ordered << 32) | lowest_first
    return n_experts - 1 - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
