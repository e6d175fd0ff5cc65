"""Wide experts on the GPU as grouped matmuls, with sizes that stay on the device: see experts.py
for the equations.

Every stage is one operator over all R rows: gather, `grouped_mm`, activation, `grouped_mm`, sum
over slots. Rows past the last offset belong to no expert and `grouped_mm` leaves them unwritten, so
they become zeros before they are read. Sums, activations and gates are float32; the result of every
product is rounded to bfloat16, as in the loop. L and F are multiples of 8."""

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.activation import activate_into, activate_with_slope
from headway.kernels.paths import ExpertInputs
from headway.kernels.permute import sum_slots


def forward(inputs: ExpertInputs, keep: bool) -> tuple[Tensor, Tensor]:
    """Return (out `[N, L]`, pre-activations `[R, G·F]`, or `[0, G·F]` unless `keep`)."""
    x_NL, gate_NK, _, _, slot_R, row_NK, counts_HE, activation = inputs
    w_in, w_out = inputs.stacked_weights()
    rows = _Rows(slot_R, row_NK, counts_HE)
    pre_R = F.grouped_mm(rows.gather(x_NL), w_in.transpose(1, 2), offs=rows.ends_G)
    hid_RF = pre_R.new_empty(len(pre_R), w_out.shape[1], dtype=torch.float32)
    activate_into(pre_R.float(), activation, hid_RF)
    y_RL = rows.clean(F.grouped_mm(hid_RF.to(x_NL.dtype), w_out, offs=rows.ends_G))
    out_NL = sum_slots(y_RL, row_NK, gate_NK)
    return out_NL, pre_R if keep else pre_R.new_empty(0, pre_R.shape[1])


def backward(
    do_NL: Tensor, inputs: ExpertInputs, pre_R: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gates, w_in and w_out."""
    x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE, activation = inputs
    w_in, w_out = inputs.stacked_weights()
    rows = _Rows(slot_R, row_NK, counts_HE)
    x_RL, do_RL = rows.gather(x_NL), rows.gather(do_NL)
    if not keep:
        pre_R = F.grouped_mm(x_RL, w_in.transpose(1, 2), offs=rows.ends_G)
    R, Fh = len(slot_R), w_out.shape[1]
    hid_RF, slope_R = (pre_R.new_empty(R, n, dtype=torch.float32) for n in (Fh, pre_R.shape[1]))
    activate_with_slope(pre_R.float(), activation, hid_RF, slope_R)
    z_RF = F.grouped_mm(do_RL, w_out.transpose(1, 2), offs=rows.ends_G).float()
    d_gate_R = rows.clean(torch.linalg.vecdot(hid_RF, z_RF).unsqueeze(1))
    gate_R1 = gate_NK.flatten()[slot_R].unsqueeze(1)
    dw_out = _outer(hid_RF.mul_(gate_R1).to(x_NL.dtype), do_RL, rows.ends_G)
    slope_R.view(R, w_in_HEGFL.shape[2], Fh).mul_(z_RF.mul_(gate_R1).unsqueeze(1))
    d_pre_R = slope_R.to(x_NL.dtype)
    dw_in = _outer(d_pre_R, x_RL, rows.ends_G)
    dx_RL = rows.clean(F.grouped_mm(d_pre_R, w_in, offs=rows.ends_G))
    d_gate = d_gate_R.flatten()[row_NK].to(gate_NK.dtype)
    dw_in, dw_out = dw_in.view(w_in_HEGFL.shape), dw_out.view(w_out_HEFL.shape)
    return (
        sum_slots(dx_RL, row_NK, None),
        d_gate,
        dw_in.to(w_in_HEGFL.dtype),
        dw_out.to(w_out_HEFL.dtype),
    )


class _Rows:
    """The permuted rows and where they end."""

    def __init__(self, slot_R: Tensor, row_NK: Tensor, counts_HE: Tensor):
        self.token_R = slot_R // row_NK.shape[1]
        self.ends_G = counts_HE.flatten().cumsum(0).to(torch.int32)
        R1 = torch.arange(len(slot_R), device=slot_R.device).unsqueeze(1)
        self.none_R1 = self.ends_G[-1] <= R1

    def gather(self, x_NL: Tensor) -> Tensor:
        """Return the sub-token of every row `[R, L]`."""
        return x_NL.index_select(0, self.token_R)

    def clean(self, y_R: Tensor) -> Tensor:
        """Write zeros into the rows of no expert."""
        return y_R.masked_fill_(self.none_R1, 0)


def _outer(a_R: Tensor, b_R: Tensor, ends_G: Tensor) -> Tensor:
    """Return aᵀ·b over each group's rows, `[H·E, width of a, width of b]`; 0 for an empty one."""
    sizes_G = ends_G.diff(prepend=ends_G.new_zeros(1))
    outer = F.grouped_mm(a_R.transpose(0, 1), b_R, offs=ends_G)
    return outer.masked_fill_((sizes_G == 0).view(-1, 1, 1), 0)
