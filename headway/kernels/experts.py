"""Stacked experts on sorted rows, exact, with a hand-written backward that keeps no output row.

N = T·H sub-tokens · L width · H heads · E experts per head · F hidden width · G pre-activations per
hidden unit · K slots · R = N·K sorted (token, slot) rows.

    X = x[token];  pre = X·W_inᵀ;  hid = act(pre);  y = hid·W_out;  out_n = Σ_k gate_nk · y[row_nk]

Backward, given do (research: the equations hold row by row, so an expert needs only its own rows):

    z = do[token]·W_outᵀ;  d_gate = Σ_F hid·z;  d_hid = gate·z;  d_pre = act'(pre, d_hid)
    dW_out = (gate·hid)ᵀ·do[token];  dW_in = d_preᵀ·X;  dx_n = Σ_k (d_pre·W_in)[row_nk]

so y is never kept, and with `recompute` nothing of size R×F is. Elementwise work is float32 or
better. One operator with four paths: the loop of PyTorch matmuls in this file, C++
(experts_cpp.py), grouped matmuls (experts_grouped.py) and Triton (gpu/experts.py). paths.py says
which of them runs."""

from collections.abc import Callable, Iterator
from itertools import repeat

import torch
from torch import Tensor

from headway.config import Activation, Precision
from headway.kernels import experts_cpp, experts_grouped
from headway.kernels.activation import (
    activate,
    activate_into,
    activate_reference,
    activate_with_slope,
)
from headway.kernels.cpp import undispatched
from headway.kernels.differentiate import reference_grads, transformed
from headway.kernels.paths import ExpertInputs, check_float8, fits_on_chip, path_of
from headway.kernels.permute import Rows, sum_slots
from headway.kernels.precision import widen, without_autocast


def experts_reference(
    x_NL: Tensor,
    gate_NK: Tensor,
    index_THK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    activation: Activation,
) -> Tensor:
    """Loop over tokens, heads and slots, in any dtype (float64 in tests); autograd gives the
    gradients.

    Args and result as in `experts`, with `index_THK` `[T, H, K]` in place of the sorted rows."""
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
    precision: Precision = "bfloat16",
) -> Tensor:
    """Return Σ over the chosen experts of gate · expert(x), for every sub-token.

    Args:
        x_NL: `[N, L]` sub-tokens, n = t·H + h; its dtype is the dtype of the matmuls (float32,
        bfloat16, float64).
        gate_NK: `[N, K]` float32 (or float64).
        rows: from `sort_rows`.
        w_in_HEGFL, w_out_HEFL: `[H, E, G, F, L]` and `[H, E, F, L]`, float32, bfloat16 (float64,
        float16); cast once per call.
        recompute: the constant-memory form; recomputes `pre` in backward (2/9 more work with
        SwiGLU). The fused kernels of narrow experts always do.
        precision: `float8` multiplies in e4m3 in the forward pass of the fused kernels
        (gpu/experts_float8.py), on bfloat16 tokens; backward is that of `bfloat16`, which stands
        for the dtype of x.
    Returns: `[N, L]` in x's dtype. Gradients of gates and weights come in their own dtype.
    Raises: UsageError for float8 where it cannot run."""
    gate_NK = widen(gate_NK)
    if w_in_HEGFL.dtype != w_out_HEFL.dtype:
        stored = torch.promote_types(w_in_HEGFL.dtype, w_out_HEFL.dtype)
        w_in_HEGFL, w_out_HEFL = w_in_HEGFL.to(stored), w_out_HEFL.to(stored)
    inputs = (x_NL, gate_NK, w_in_HEGFL, w_out_HEFL)
    if transformed():
        return experts_dense(ExpertInputs(*inputs, *rows, activation))
    keep = not recompute and precision != "float8" and torch.is_grad_enabled()
    run = _run_forward if undispatched(x_NL) else _forward
    return run(*inputs, *rows, activation, keep, precision)[0]


def _functions(inputs: ExpertInputs) -> tuple[Callable, Callable]:
    """Return forward and backward of the path for these tensors."""
    match path_of(inputs):
        case "fused":
            from headway.kernels.gpu import experts as fused  # imports Triton

            return fused.forward, fused.backward
        case "grouped":
            return experts_grouped.forward, experts_grouped.backward
        case "cpp":
            return experts_cpp.forward, experts_cpp.backward
        case "loop":
            return _loop_forward, _loop_backward


def _run_forward(
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    activation: str,
    keep: bool,
    precision: str = "bfloat16",
) -> tuple[Tensor, Tensor]:
    """Return (out `[N, L]`, pre-activations `[R, G·F]`, or `[0, G·F]` unless `keep`)."""
    weights = (w_in_HEGFL, w_out_HEFL)
    inputs = ExpertInputs(x_NL, gate_NK, *weights, slot_R, row_NK, counts_HE, activation)
    if precision == "float8":
        check_float8(x_NL.device.type, x_NL.dtype, x_NL.shape[1], w_in_HEGFL.shape[3], activation)
        from headway.kernels.gpu import experts as fused

        return fused.forward(inputs, keep, precision)
    return _functions(inputs)[0](inputs, keep)


_forward = torch.library.custom_op("headway::experts", _run_forward, mutates_args=())


@torch.library.custom_op("headway::experts_backward", mutates_args=())
def _backward(
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
    """Return the gradients of x, gates, w_in and w_out."""
    weights = (w_in_HEGFL, w_out_HEFL)
    inputs = ExpertInputs(x_NL, gate_NK, *weights, slot_R, row_NK, counts_HE, activation)
    return _functions(inputs)[1](do_NL.contiguous(), inputs, pre_R, keep)


@_forward.register_fake
def _(x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE, activation, keep, *_):
    width = w_in_HEGFL.shape[2] * w_in_HEGFL.shape[3]
    out_NL = torch.empty_like(x_NL, memory_format=torch.contiguous_format)
    weights = (w_in_HEGFL, w_out_HEFL)
    inputs = ExpertInputs(x_NL, gate_NK, *weights, slot_R, row_NK, counts_HE, activation)
    if path_of(inputs) == "fused":
        keep = keep and not fits_on_chip(x_NL.dtype, x_NL.shape[1], w_out_HEFL.shape[2])
    return out_NL, x_NL.new_empty(slot_R.numel() if keep else 0, width)


@_backward.register_fake
def _(do_NL, x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, *tables):
    like = (x_NL, gate_NK, w_in_HEGFL, w_out_HEFL)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the output that is only kept
    *tensors, ctx.activation, ctx.keep, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx, do_NL, _):
    if do_NL is None:  # PyTorch may ask without a gradient
        return (None,) * 10
    if torch.is_grad_enabled():
        *inputs, slot_R, row_NK, counts_HE, _ = ctx.saved_tensors
        rows = Rows(slot_R, row_NK, counts_HE)

        def dense(x: Tensor, gate: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[Tensor]:
            return (experts_dense(ExpertInputs(x, gate, w_in, w_out, *rows, ctx.activation)),)

        grads = reference_grads(dense, inputs, ctx.needs_input_grad[:4], (do_NL,))
        return (*grads, *(None,) * 6)
    grads = _backward(do_NL, *ctx.saved_tensors, ctx.activation, ctx.keep)
    return (*grads, *(None,) * 6)


_forward.register_autograd(_autograd, setup_context=_save)


def _loop_forward(inputs: ExpertInputs, keep: bool) -> tuple[Tensor, Tensor]:
    """Multiply one expert at a time: its rows (a few hundred) stay in the cache from the gather to
    the last matmul, and all experts share the scratch buffers `…_s`. Sizes are read on the host.

    The result of every bfloat16 matmul is rounded: 3e-3 to 5e-3 against float64, where the kernels
    stay below 3e-3."""
    x_NL, gate_NK, _, _, slot_R, row_NK, counts_HE, activation = inputs
    w_in, w_out = inputs.stacked_weights()
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


def _loop_backward(
    do_NL: Tensor, inputs: ExpertInputs, pre_R: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE, activation = inputs
    w_in, w_out = inputs.stacked_weights()
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
    z_s = x_NL.new_empty(most, Fh)
    hid_s, dpre_s = _Scratch(most, Fh, x_NL), _Scratch(most, GF, x_NL)
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
    """Yield (expert, number of rows, its slice of each table…) for every expert that has rows."""
    sizes = [n for n in counts if n]
    parts = [repeat(None) if t is None else t[: sum(sizes)].split(sizes) for t in tables]
    return zip((e for e, n in enumerate(counts) if n), sizes, *parts, strict=False)


class _Scratch:
    """A buffer for elementwise work in float32 or better, and one in the dtype of the matmuls."""

    def __init__(self, rows: int, width: int, like: Tensor):
        wide = torch.promote_types(like.dtype, torch.float32)
        self.wide = like.new_empty(rows, width, dtype=wide)
        self._narrow = self.wide if wide == like.dtype else like.new_empty(rows, width)

    def narrow(self, values: Tensor) -> Tensor:
        """Return `values`, a slice of `wide`, in the dtype of the matmuls."""
        return values if self._narrow is self.wide else self._narrow[: len(values)].copy_(values)


def _mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Set out = a·b; the product accumulates in float32 and is rounded to a's dtype once."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def experts_dense(inputs: ExpertInputs) -> Tensor:
    """Return what `experts` does, in operators that PyTorch differentiates any number of times,
    batches (`vmap`) and pushes forward (`jvp`): every expert sees every sub-token, at E/K times the
    products, with a gate of 0 where it was not chosen. Sizes do not depend on the data.

    Returns: `[N, L]` in x's dtype; elementwise work is in float32 or better, and one matmul sums
    over hidden units and experts."""
    x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, _, row_NK, counts_HE, activation = inputs
    H, E = w_in_HEGFL.shape[:2]
    x_HTL = x_NL.unflatten(0, (-1, H)).transpose(0, 1)
    w_in, w_out = w_in_HEGFL.to(x_NL.dtype), w_out_HEFL.to(x_NL.dtype)
    with without_autocast(x_NL):
        pre = torch.bmm(x_HTL, w_in.flatten(1, 3).transpose(1, 2)).unflatten(-1, (E, -1))
        wide = widen(pre)
        gate_HTE = _dense_gates(gate_NK, row_NK, counts_HE).transpose(0, 1).to(wide.dtype)
        hid = activate_reference(wide, activation) * gate_HTE.unsqueeze(-1)
        y_HTL = torch.bmm(hid.flatten(2).to(x_NL.dtype), w_out.flatten(1, 2))
    return y_HTL.transpose(0, 1).reshape(x_NL.shape)


def _dense_gates(gate_NK: Tensor, row_NK: Tensor, counts_HE: Tensor) -> Tensor:
    """Return the gate of every expert `[T, H, E]`; 0 unless one of the sub-token's rows lies
    between the expert's first and last."""
    H, E = counts_HE.shape
    ends_HE = counts_HE.flatten().cumsum(0).view(H, E)
    starts_HE = ends_HE - counts_HE
    row_THK1 = row_NK.unflatten(0, (-1, H)).unsqueeze(-1)
    chosen_THKE = (row_THK1 >= starts_HE.unsqueeze(1)) & (row_THK1 < ends_HE.unsqueeze(1))
    return (gate_NK.unflatten(0, (-1, H)).unsqueeze(-1) * chosen_THKE).sum(2)
