"""Exact top-k whose ties go to the lowest index.

T tokens · H heads · E experts · K chosen. `torch.topk` leaves the order of ties open, so two
devices, or two runs, may route a token differently. `max` names the first maximum, so k rounds of
it give a total order; for the k of a router that is also faster than sorting."""

import torch
from torch import Tensor

from headway.kernels.differentiate import transformed

MAX_ROUNDS = 8  # beyond this a stable sort is faster


def top_k_reference(scores_THE: Tensor, k: int) -> Tensor:
    """Return int64 `[..., k]`: the k largest, best first, ties to the lowest index, NaN largest."""
    return torch.sort(scores_THE, dim=-1, descending=True, stable=True).indices[..., :k]


def top_k(scores_THE: Tensor, k: int) -> Tensor:
    """Return what `top_k_reference` does (−inf ties with the lowest finite number)."""
    if k > MAX_ROUNDS or transformed():
        return top_k_reference(scores_THE, k)
    # a taken score becomes −inf, so that one not taken must stay above it
    left = scores_THE.detach().clamp(min=torch.finfo(scores_THE.dtype).min)
    taken = []
    for _ in range(k):
        best = left.max(dim=-1, keepdim=True).indices
        taken.append(best)
        left.scatter_(-1, best, -torch.inf)
    return torch.cat(taken, dim=-1)


def top_k_in_groups(
    scores_THE: Tensor, k: int, n_groups: int, top_k_groups: int, group_best: int
) -> Tensor:
    """Return int64 `[..., k]` as `top_k`, from the `top_k_groups` best of `n_groups` equal groups
    of experts alone; ties of groups to the lowest index. A group is as good as the sum of its
    `group_best` largest scores."""
    scores_TGE = scores_THE.detach().unflatten(-1, (n_groups, -1))
    group = top_k(scores_TGE.topk(group_best, -1).values.sum(-1), top_k_groups)
    outside = torch.ones_like(scores_TGE[..., 0], dtype=torch.bool).scatter(-1, group, False)
    return top_k(scores_TGE.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2), k)
