"""Experts in PyTorch's operators, any dtype and device: see experts.py for the equations.

One expert at a time: its rows (a few hundred) stay in the cache from the gather to the last matmul,
and every intermediate lives in a scratch buffer that all experts share. The result of every
bfloat16 matmul is rounded: 3e-3 to 5e-3 against float64, where the kernels stay below 3e-3. The
sizes of the experts are read on the host.
"""

from collections.abc import Iterator
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.activation import activate_into, activate_with_slope
from headway.kernels.precision import widen


def forward(
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    w_in, w_out = _stack(w_in_HEGFL, w_out_HEFL, x_NL.dtype)
    counts = counts_HE.flatten().tolist()
    taken, most = sum(counts), max(counts, default=0)
    token_R = slot_R // row_NK.shape[1]
    y_RL = x_NL.new_empty(slot_R.numel(), x_NL.shape[1])
    y_RL[taken:] = 0  # slots without an expert
    pre_R = x_NL.new_empty(slot_R.numel() if keep else 0, w_in.shape[1])
    pre_s = x_NL.new_empty(0 if keep else most, w_in.shape[1])
    x_s = x_NL.new_empty(most, x_NL.shape[1])
    hid_s = _Scratch(most, w_out.shape[1], x_NL)
    w_in_T = w_in.transpose(1, 2)
    for e, n, token, y, pre in _groups(counts, token_R, y_RL, pre_R if keep else None):
        x = torch.index_select(x_NL, 0, token, out=x_s[:n])
        pre = torch.mm(x, w_in_T[e], out=pre_s[:n] if pre is None else pre)
        hid = activate_into(widen(pre), activation, hid_s.wide[:n])
        torch.mm(hid_s.narrow(hid), w_out[e], out=y)
    return sum_slots(y_RL, row_NK, gate_NK), pre_R


def backward(
    do_NL: Tensor,
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    pre_R: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w_in, w_out = _stack(w_in_HEGFL, w_out_HEFL, x_NL.dtype)
    counts = counts_HE.flatten().tolist()
    taken, most = sum(counts), max(counts, default=0)
    L, (_, GF, _), Fh = x_NL.shape[1], w_in.shape, w_out.shape[1]
    token_R = slot_R // row_NK.shape[1]
    gate_R1 = gate_NK.flatten()[slot_R].unsqueeze(1)
    d_gate_R = gate_NK.new_zeros(slot_R.numel())
    dx_RL = x_NL.new_empty(slot_R.numel(), L)
    dx_RL[taken:] = 0
    dw_in = torch.empty_like(w_in_HEGFL, memory_format=torch.contiguous_format)
    dw_out = torch.empty_like(w_out_HEFL, memory_format=torch.contiguous_format)
    dw_in_E, dw_out_E = dw_in.view(-1, GF, L), dw_out.view(-1, Fh, L)
    for e in (e for e, n in enumerate(counts) if n == 0):
        dw_in_E[e], dw_out_E[e] = 0, 0
    x_s, do_s = x_NL.new_empty(most, L), x_NL.new_empty(most, L)
    z_s, hid_s, dpre_s = (
        x_NL.new_empty(most, Fh),
        _Scratch(most, Fh, x_NL),
        _Scratch(most, GF, x_NL),
    )
    pre_s = x_NL.new_empty(0 if keep else most, GF)
    w_in_T, w_out_T = w_in.transpose(1, 2), w_out.transpose(1, 2)
    tables = (token_R, gate_R1, d_gate_R, dx_RL, pre_R if keep else None)
    for e, n, token, gate, d_gate, dx, pre in _groups(counts, *tables):
        x = torch.index_select(x_NL, 0, token, out=x_s[:n])
        do = torch.index_select(do_NL, 0, token, out=do_s[:n])
        if pre is None:
            pre = torch.mm(x, w_in_T[e], out=pre_s[:n])
        hid, dpre = hid_s.wide[:n], dpre_s.wide[:n]
        activate_with_slope(widen(pre), activation, hid, dpre)
        z = widen(torch.mm(do, w_out_T[e], out=z_s[:n]))
        d_gate.copy_(torch.linalg.vecdot(hid, z))
        _mm_into(dw_out_E[e], hid_s.narrow(hid.mul_(gate)).T, do)
        dpre.view(n, -1, Fh).mul_(z.mul_(gate).unsqueeze(1))
        dpre = dpre_s.narrow(dpre)
        _mm_into(dw_in_E[e], dpre.T, x)
        torch.mm(dpre, w_in[e], out=dx)
    return sum_slots(dx_RL, row_NK, None), d_gate_R[row_NK], dw_in, dw_out


def _groups(counts: list[int], *tables: Tensor | None) -> Iterator[tuple]:
    """(expert, rows, its slice of each table…) for every expert that has rows; one `split` per
    table.
    """
    sizes = [n for n in counts if n]
    parts = [repeat(None) if t is None else t[: sum(sizes)].split(sizes) for t in tables]
    return zip((e for e, n in enumerate(counts) if n), sizes, *parts, strict=False)


def _stack(w_in_HEGFL: Tensor, w_out_HEFL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights as `[H·E, G·F, L]` and `[H·E, F, L]` in the dtype of the matmuls (a view where it is
    theirs already).
    """
    return w_in_HEGFL.flatten(2, 3).flatten(0, 1).to(dtype), w_out_HEFL.flatten(0, 1).to(dtype)


class _Scratch:
    """A buffer for elementwise work in float32 (or better), and one for its rounding to the dtype
    of the matmuls.
    """

    def __init__(self, rows: int, width: int, like: Tensor):
        wide = torch.promote_types(like.dtype, torch.float32)
        self.wide = like.new_empty(rows, width, dtype=wide)
        self._narrow = self.wide if wide == like.dtype else like.new_empty(rows, width)

    def narrow(self, values: Tensor) -> Tensor:
        """`values`, a slice of `wide`, in the dtype of the matmuls; itself where it is the same."""
        return values if self._narrow is self.wide else self._narrow[: len(values)].copy_(values)


def _mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a·b; the product accumulates in float32 and is rounded to a's dtype once."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def sum_slots(y_RL: Tensor, row_NK: Tensor, weight_NK: Tensor | None) -> Tensor:
    """out_n = Σ_k weight_nk · y[row_nk] in fixed order of k; `embedding_bag` is a fused gather and
    weighted sum.
    """
    N, K = row_NK.shape
    if y_RL.dtype in (torch.bfloat16, torch.float16) or y_RL.device.type != "cpu":
        y_NKL = widen(y_RL[row_NK])
        if weight_NK is not None:
            y_NKL = y_NKL * weight_NK.unsqueeze(-1)
        return y_NKL.sum(1).to(y_RL.dtype)
    starts = torch.arange(0, N * K, K, device=row_NK.device)
    weight = None if weight_NK is None else weight_NK.flatten().to(y_RL.dtype)
    return F.embedding_bag(row_NK.flatten(), y_RL, starts, mode="sum", per_sample_weights=weight)
