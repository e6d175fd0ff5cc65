"""Targets that a window itself gives away: what copying from an earlier place solves.

    tokens   … f o o ( x ) … f o o ( ?        the last four tokens, `foo(`, occurred before;
                       ↑             ↑        after them came `x`: the target is copied if it is `x`

A small model learns to copy suddenly, with one seed earlier than with another; the loss without
these positions does not jump then."""

import torch
from torch import Tensor

CONTEXT = 4
"""Tokens that must have occurred before."""


def copied(tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Return bool `[B, S]`: targets that follow the last earlier occurrence, in the same window, of
    the `CONTEXT` tokens up to theirs. No model is read."""
    B, S = tokens_BS.shape
    if S <= CONTEXT:
        return torch.zeros_like(tokens_BS, dtype=torch.bool)
    ends_BS = tokens_BS.unfold(1, CONTEXT, 1)  # [B, S − CONTEXT + 1, CONTEXT], by their last token
    place_S = torch.arange(S, device=tokens_BS.device)
    same_BTS = torch.zeros(B, S, S, dtype=torch.bool, device=tokens_BS.device)
    first = CONTEXT - 1
    same_BTS[:, first:, first:] = (ends_BS[:, :, None] == ends_BS[:, None]).all(3)
    same_BTS &= place_S[:, None] > place_S[None, :]
    last_BS = torch.where(same_BTS, place_S, -1).amax(2)
    guess_BS = tokens_BS.gather(1, (last_BS + 1).clamp(max=S - 1))
    return (last_BS >= 0) & (guess_BS == targets_BS)
