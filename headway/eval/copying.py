"""Targets that a window itself gives away: what copying from an earlier place solves.

    tokens   … f o o ( x ) … f o o ( ?        the last four tokens, `foo(`, occurred before;
                       ↑             ↑        after them came `x`: the target is copied if it is `x`

A small model learns to copy suddenly, with one seed earlier than with another; the loss without
these positions does not jump then."""

from collections.abc import Sequence

import torch
from torch import Tensor

CONTEXT = 4
"""Tokens that must have occurred before."""


def copied(tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Return bool `[B, S]`: targets that follow the last earlier occurrence, in the same window, of
    the `CONTEXT` tokens up to theirs; both arguments are int64 `[B, S]`.

    No model is read. Documents are not kept apart, so that models with and without `data.doc_mask`
    are compared on the same targets; windows of another length give away others."""
    B, S = tokens_BS.shape
    if S <= CONTEXT:
        return torch.zeros_like(tokens_BS, dtype=torch.bool)
    grams = tokens_BS.unfold(1, CONTEXT, 1).flatten(0, 1)  # of N = S − CONTEXT + 1 places
    gram_BN = grams.unique(dim=0, return_inverse=True)[1].view(B, -1)
    # equal ones stand side by side, in the order of their places
    gram_BN, place_BN = gram_BN.sort(dim=1, stable=True)
    again = gram_BN[:, 1:] == gram_BN[:, :-1]
    guess = tokens_BS.gather(1, (place_BN[:, :-1] + CONTEXT).clamp(max=S - 1))
    last = place_BN[:, 1:] + CONTEXT - 1
    is_copied = again & (guess == targets_BS.gather(1, last))
    return torch.zeros_like(tokens_BS, dtype=torch.bool).scatter_(1, last, is_copied)


def repeated(ids: Sequence[int]) -> float:
    """Return the share of the tokens of a text that follow what followed the last earlier
    occurrence of the four before them, as in a text that goes round in circles; 0 without any."""
    if len(ids) < 2:
        return 0.0
    tokens_1S = torch.tensor([list(ids)])
    return float(copied(tokens_1S[:, :-1], tokens_1S[:, 1:]).sum()) / len(ids)
