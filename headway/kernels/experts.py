"""Stacked experts on sorted rows, exact, with a hand-written backward that keeps no output row.

N = T·H sub-tokens · L width · H heads · E experts per head · F hidden width · G pre-activations per
hidden unit · K slots · R = N·K sorted (token, slot) rows.

    X = x[token];  pre = X·W_inᵀ;  hid = act(pre);  y = hid·W_out;  out_n = Σ_k gate_nk · y[row_nk]

Backward, given do (research: the equations hold row by row, so an expert needs only its own rows):

    z = do[token]·W_outᵀ;  d_gate = Σ_F hid·z;  d_hid = gate·z;  d_pre = act'(pre, d_hid)
    dW_out = (gate·hid)ᵀ·do[token];  dW_in = d_preᵀ·X;  dx_n = Σ_k (d_pre·W_in)[row_nk]

so y is never kept, and with `recompute` nothing of size R×F is. Elementwise work is float32 or
better. On CPUs with a compiler the kernels of cpu/experts.cpp run, else a loop of PyTorch matmuls.
That loop rounds the result of every bfloat16 matmul: 3e-3 to 5e-3 against float64, where the
kernels stay below 3e-3.
"""

from collections.abc import Iterator
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.config import Activation
from headway.kernels.activation import activate, activate_into, activate_with_slope
from headway.kernels.native import native
from headway.kernels.rows import Rows


def experts_reference(
    x_NL: Tensor,
    gate_NK: Tensor,
    index_THK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    activation: Activation,
) -> Tensor:
    """Plain loops over tokens, heads and slots, any dtype (float64 in tests); autograd gives the
    gradients.

    Args and result as in `experts`, with `index_THK` `[T, H, K]` in place of the sorted rows.
    """
    T, H, K = index_THK.shape
    E = w_in_HEGFL.shape[1]
    out = []
    for n in range(T * H):
        t, h = divmod(n, H)
        y_L = torch.zeros_like(x_NL[n])
        for k in range(K):
            e = int(index_THK[t, h, k])
            if e == E:  # no expert
                continue
            pre = w_in_HEGFL[h, e].flatten(0, 1) @ x_NL[n]
            y_L = y_L + gate_NK[n, k] * (activate(pre, activation) @ w_out_HEFL[h, e])
        out.append(y_L)
    return torch.stack(out) if out else torch.zeros_like(x_NL)


def experts(
    x_NL: Tensor,
    gate_NK: Tensor,
    rows: Rows,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    activation: Activation,
    recompute: bool = False,
) -> Tensor:
    """Σ over the chosen experts of gate · expert(x), for every sub-token.

    Args:
        x_NL: `[N, L]` sub-tokens, n = t·H + h; its dtype is the dtype of the matmuls (float32,
        bfloat16, float64).
        gate_NK: `[N, K]` float32 (or float64).
        rows: from `sort_rows`.
        w_in_HEGFL, w_out_HEFL: `[H, E, G, F, L]` and `[H, E, F, L]`, float32 (or float64); cast
        once per call.
        recompute: the constant-memory form; recomputes `pre` in backward (2/9 more work with
        SwiGLU).
    Returns: `[N, L]` in x's dtype. Gradients of gates and weights come in their own dtype.
    """
    keep = not recompute and torch.is_grad_enabled()
    return _forward(x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, *rows, activation, keep)[0]


@torch.library.custom_op("headway::experts", mutates_args=())
def _forward(
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(out `[N, L]`, pre-activations `[R, G·F]`, or `[0, G·F]` unless `keep`)."""
    inputs = (x_NL, gate_NK, w_in_HEGFL, w_out_HEFL)
    tables = (token_R, slot_R, row_NK, counts_HE)
    run = _forward_native if _is_native(*inputs) else _forward_loop
    return run(*inputs, *tables, activation, keep)


@torch.library.custom_op("headway::experts_backward", mutates_args=())
def _backward(
    do_NL: Tensor,
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    pre_R: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, w_in and w_out."""
    inputs = (x_NL, gate_NK, w_in_HEGFL, w_out_HEFL)
    tables = (token_R, slot_R, row_NK, counts_HE)
    run = _backward_native if _is_native(*inputs) else _backward_loop
    return run(do_NL.contiguous(), *inputs, *tables, pre_R, activation, keep)


@_forward.register_fake
def _(x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, token_R, slot_R, row_NK, counts_HE, activation, keep):
    width = w_in_HEGFL.shape[2] * w_in_HEGFL.shape[3]
    out_NL = torch.empty_like(x_NL, memory_format=torch.contiguous_format)
    return out_NL, x_NL.new_empty(token_R.numel() if keep else 0, width)


@_backward.register_fake
def _(do_NL, x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, *tables):
    like = (x_NL, gate_NK, w_in_HEGFL, w_out_HEFL)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the output that is only kept
    *tensors, ctx.activation, ctx.keep = inputs
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx, do_NL, _):
    grads = _backward(do_NL, *ctx.saved_tensors, ctx.activation, ctx.keep)
    return (*grads, None, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_save)


# The kernels of cpu/experts.cpp: packed weights and every intermediate of an expert in the cache,
# float32 from the first product to the last rounding.


def _is_native(x: Tensor, gate: Tensor, w_in: Tensor, w_out: Tensor) -> bool:
    masters = (gate.dtype, w_in.dtype, w_out.dtype)
    return native().takes(x, gate) and masters == (torch.float32,) * 3


def _sizes(w_in_HEGFL: Tensor, activation: str) -> tuple[int, ...]:
    """Groups, L, F, G and the activation's number, as the kernels take them."""
    H, E, G, Fh, L = w_in_HEGFL.shape
    return H * E, L, Fh, G, ("swiglu", "relu2", "gelu").index(activation)


def _forward_native(
    x, gate, w_in, w_out, token_R, slot_R, row_NK, counts_HE, activation, keep
) -> tuple[Tensor, Tensor]:
    x, w_in, w_out = x.contiguous(), w_in.contiguous(), w_out.contiguous()
    R = token_R.numel()
    y_RL = x.new_empty(R, x.shape[1], dtype=torch.float32)
    pre_R = x.new_empty(R if keep else 0, w_in.shape[2] * w_in.shape[3])
    kept, sizes = pre_R if keep else None, _sizes(w_in, activation)
    weights = (w_in, w_out, token_R, counts_HE)
    native().call("experts_forward", x.dtype, x, *weights, *sizes, kept, y_RL)
    return _combine_native(x, y_RL, row_NK, counts_HE, gate.contiguous()), pre_R


def _backward_native(
    do, x, gate, w_in, w_out, token_R, slot_R, row_NK, counts_HE, pre_R, activation, keep
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w_in, w_out = x.contiguous(), w_in.contiguous(), w_out.contiguous()
    dx_RL = x.new_empty(token_R.numel(), x.shape[1], dtype=torch.float32)
    d_gate = torch.zeros_like(gate, memory_format=torch.contiguous_format)
    dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
    inputs = (x, do, gate.contiguous(), w_in, w_out, token_R, slot_R, counts_HE)
    kept, sizes = pre_R if keep else None, _sizes(w_in, activation)
    found = (dx_RL, d_gate, dw_in, dw_out)
    native().call("experts_backward", x.dtype, *inputs, *sizes, kept, *found)
    return _combine_native(x, dx_RL, row_NK, counts_HE, None), d_gate, dw_in, dw_out


def _combine_native(
    like: Tensor, y_RL: Tensor, row_NK: Tensor, counts_HE: Tensor, weight: Tensor | None
) -> Tensor:
    out, (N, K), taken = torch.empty_like(like), row_NK.shape, int(counts_HE.sum())
    sizes = (N, K, like.shape[1], taken)
    native().call("combine", like.dtype, y_RL, row_NK, weight, *sizes, out)
    return out


# The same with PyTorch's operators, any dtype and device. One expert at a time: its rows (a few
# hundred) stay in the cache from the gather to the last matmul, and every intermediate lives in a
# scratch buffer that all experts share.


def _forward_loop(
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    w_in, w_out = _stack(w_in_HEGFL, w_out_HEFL, x_NL.dtype)
    counts = counts_HE.flatten().tolist()
    taken, most = sum(counts), max(counts, default=0)
    y_RL = x_NL.new_empty(token_R.numel(), x_NL.shape[1])
    y_RL[taken:] = 0  # slots without an expert
    pre_R = x_NL.new_empty(token_R.numel() if keep else 0, w_in.shape[1])
    pre_s = x_NL.new_empty(0 if keep else most, w_in.shape[1])
    x_s = x_NL.new_empty(most, x_NL.shape[1])
    hid_s = _Scratch(most, w_out.shape[1], x_NL)
    w_in_T = w_in.transpose(1, 2)
    for e, n, token, y, pre in _groups(counts, token_R, y_RL, pre_R if keep else None):
        x = torch.index_select(x_NL, 0, token, out=x_s[:n])
        pre = torch.mm(x, w_in_T[e], out=pre_s[:n] if pre is None else pre)
        hid = activate_into(_widen(pre), activation, hid_s.wide[:n])
        torch.mm(hid_s.narrow(hid), w_out[e], out=y)
    return _sum_slots(y_RL, row_NK, gate_NK), pre_R


def _backward_loop(
    do_NL: Tensor,
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    token_R: Tensor,
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
    gate_R1 = gate_NK.flatten()[slot_R].unsqueeze(1)
    d_gate_R = gate_NK.new_zeros(token_R.numel())
    dx_RL = x_NL.new_empty(token_R.numel(), L)
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
        activate_with_slope(_widen(pre), activation, hid, dpre)
        z = _widen(torch.mm(do, w_out_T[e], out=z_s[:n]))
        d_gate.copy_(torch.linalg.vecdot(hid, z))
        _mm_into(dw_out_E[e], hid_s.narrow(hid.mul_(gate)).T, do)
        dpre.view(n, -1, Fh).mul_(z.mul_(gate).unsqueeze(1))
        dpre = dpre_s.narrow(dpre)
        _mm_into(dw_in_E[e], dpre.T, x)
        torch.mm(dpre, w_in[e], out=dx)
    return _sum_slots(dx_RL, row_NK, None), d_gate_R[row_NK], dw_in, dw_out


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
        wide = torch.float32 if like.dtype == torch.bfloat16 else like.dtype
        self.wide = like.new_empty(rows, width, dtype=wide)
        self._narrow = self.wide if wide == like.dtype else like.new_empty(rows, width)

    def narrow(self, values: Tensor) -> Tensor:
        """`values`, a slice of `wide`, in the dtype of the matmuls; itself where it is the same."""
        return values if self._narrow is self.wide else self._narrow[: len(values)].copy_(values)


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def _mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a·b; the product accumulates in float32 and is rounded to a's dtype once."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _sum_slots(y_RL: Tensor, row_NK: Tensor, weight_NK: Tensor | None) -> Tensor:
    """out_n = Σ_k weight_nk · y[row_nk] in fixed order of k; `embedding_bag` is a fused gather and
    weighted sum.
    """
    N, K = row_NK.shape
    if y_RL.dtype == torch.bfloat16 or y_RL.device.type != "cpu":
        y_NKL = y_RL[row_NK].float()
        if weight_NK is not None:
            y_NKL = y_NKL * weight_NK.unsqueeze(-1)
        return y_NKL.sum(1).to(y_RL.dtype)
    starts = torch.arange(0, N * K, K, device=row_NK.device)
    weight = None if weight_NK is None else weight_NK.flatten()
    return F.embedding_bag(row_NK.flatten(), y_RL, starts, mode="sum", per_sample_weights=weight)
