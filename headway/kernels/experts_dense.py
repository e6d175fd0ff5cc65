"""Experts in operators that PyTorch differentiates any number of times, batches (`vmap`) and
pushes forward (`jvp`): every expert sees every sub-token, at E/K times the products of experts.py.

The gates of the experts that were not chosen are 0. Sizes do not depend on the data.
"""

import torch
from torch import Tensor

from headway.kernels.activation import activate_reference
from headway.kernels.permute import Rows
from headway.kernels.precision import widen, without_autocast


def experts_dense(
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    rows: Rows,
    activation: str,
) -> Tensor:
    """`experts` of experts.py: `[N, L]` in x's dtype, with elementwise work in float32 or better
    and one matmul that sums over hidden units and experts."""
    H, E = w_in_HEGFL.shape[:2]
    x_HTL = x_NL.unflatten(0, (-1, H)).transpose(0, 1)
    w_in, w_out = w_in_HEGFL.to(x_NL.dtype), w_out_HEFL.to(x_NL.dtype)
    with without_autocast(x_NL):
        pre = torch.bmm(x_HTL, w_in.flatten(1, 3).transpose(1, 2)).unflatten(-1, (E, -1))
        wide = widen(pre)
        gate_HTE = _gates(gate_NK, rows).transpose(0, 1).to(wide.dtype)
        hid = activate_reference(wide, activation) * gate_HTE.unsqueeze(-1)
        y_HTL = torch.bmm(hid.flatten(2).to(x_NL.dtype), w_out.flatten(1, 2))
    return y_HTL.transpose(0, 1).reshape(x_NL.shape)


def _gates(gate_NK: Tensor, rows: Rows) -> Tensor:
    """`[T, H, E]`: the gate of every expert, found by where its rows begin and end."""
    H, E = rows.counts_HE.shape
    ends_HE = rows.counts_HE.flatten().cumsum(0).view(H, E)
    starts_HE = ends_HE - rows.counts_HE
    row_THK1 = rows.row_NK.unflatten(0, (-1, H)).unsqueeze(-1)
    chosen_THKE = (row_THK1 >= starts_HE.unsqueeze(1)) & (row_THK1 < ends_HE.unsqueeze(1))
    return (gate_NK.unflatten(0, (-1, H)).unsqueeze(-1) * chosen_THKE).sum(2)
