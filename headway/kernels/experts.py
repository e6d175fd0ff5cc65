"""Stacked experts on sorted rows, exact, with a hand-written backward that keeps no output row.

N = T·H sub-tokens · L width · H heads · E experts per head · F hidden width · G pre-activations per
hidden unit · K slots · R = N·K sorted (token, slot) rows.

    X = x[token];  pre = X·W_inᵀ;  hid = act(pre);  y = hid·W_out;  out_n = Σ_k gate_nk · y[row_nk]

Backward, given do (research: the equations hold row by row, so an expert needs only its own rows):

    z = do[token]·W_outᵀ;  d_gate = Σ_F hid·z;  d_hid = gate·z;  d_pre = act'(pre, d_hid)
    dW_out = (gate·hid)ᵀ·do[token];  dW_in = d_preᵀ·X;  dx_n = Σ_k (d_pre·W_in)[row_nk]

so y is never kept, and with `recompute` nothing of size R×F is. Elementwise work is float32 or
better. One operator, four paths, and `choose` says which runs: fused Triton kernels
(gpu/experts.py), grouped matmuls for wide experts (experts_grouped.py), C++ (experts_cpp.py), a
loop of PyTorch matmuls (experts_loop.py).
"""

from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headway.config import Activation, Precision, UsageError
from headway.kernels import experts_cpp, experts_grouped, experts_loop
from headway.kernels.activation import activate
from headway.kernels.cpp import cpp_kernels
from headway.kernels.differentiate import reference_grads, transformed
from headway.kernels.experts_dense import experts_dense
from headway.kernels.gpu import TAKEN, gpu
from headway.kernels.permute import Rows
from headway.kernels.precision import widen

WIDEST = {torch.bfloat16: 256, torch.float32: 128}
"""L up to which the fused forward pass keeps hidden units on the chip, by the dtype of x. Above,
the float32 sums of a tile leave no registers for anything else."""

MOST_GROUPS = 1023
"""Groups of one `F.grouped_mm` on a CUDA device; PyTorch refuses more."""


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
    precision: Precision = "bfloat16",
) -> Tensor:
    """Σ over the chosen experts of gate · expert(x), for every sub-token.

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
    Raises: UsageError for float8 where it cannot run.
    """
    gate_NK = widen(gate_NK)
    if w_in_HEGFL.dtype != w_out_HEFL.dtype:
        stored = torch.promote_types(w_in_HEGFL.dtype, w_out_HEFL.dtype)
        w_in_HEGFL, w_out_HEFL = w_in_HEGFL.to(stored), w_out_HEFL.to(stored)
    inputs = (x_NL, gate_NK, w_in_HEGFL, w_out_HEFL)
    if transformed():
        return experts_dense(*inputs, rows, activation)
    keep = not recompute and precision != "float8" and torch.is_grad_enabled()
    return _forward(*inputs, *rows, activation, keep, precision)[0]


class Choice(NamedTuple):
    """Which path runs."""

    path: Literal["fused", "grouped", "cpp", "loop"]
    why: str
    """One line for people."""


def choose(
    device: str,
    dtype: torch.dtype,
    L: int,
    F: int,
    n_groups: int = 1,
    masters: torch.dtype = torch.float32,
) -> Choice:
    """The path for experts of width L and hidden width F: asks the machine, never the data.

    Args: device: `cuda` or `cpu`; dtype: of x; n_groups: H·E of this process; masters: of gates and
    weights, where they are not float32.
    """
    if masters not in TAKEN:
        return Choice("loop", f"a loop of matmuls: gates or weights are {masters}")
    if device == gpu().device and dtype in TAKEN:
        return Choice("fused", f"Triton kernels: {gpu().why}")
    if dtype not in TAKEN:
        why = f"the Triton kernels take bfloat16 and float32, not {dtype}"
    else:
        why = f"no Triton kernels: {gpu().why}"
    if device == "cpu" and cpp_kernels().library is not None:
        if cpp_kernels().supports(torch.empty(0, dtype=dtype)):
            return Choice("cpp", f"C++ kernels: {cpp_kernels().why}")
        return Choice("loop", f"a loop of matmuls: the C++ kernels do not take {dtype} here")
    if device == "cpu":
        return Choice("loop", f"a loop of matmuls: {cpp_kernels().why}")
    if dtype == torch.bfloat16 and L % 8 == 0 and F % 8 == 0 and _has_grouped_matmuls():
        if n_groups <= MOST_GROUPS:
            return Choice("grouped", f"grouped matmuls, sizes stay on the device; {why}")
        why = f"{n_groups} experts are more than the {MOST_GROUPS} of a grouped matmul; {why}"
    return Choice("loop", f"a loop of matmuls, sizes are read on the host, slow; {why}")


def narrow(dtype: torch.dtype, L: int, F: int) -> bool:
    """Whether the fused forward pass keeps hidden units on the chip (gpu/experts_narrow.py). Those
    of wider experts go through memory (gpu/experts_wide.py)."""
    return L % 16 == 0 and F % 16 == 0 and WIDEST[dtype] >= L


def check_float8(device: str, dtype: torch.dtype, L: int, F: int) -> None:
    """Raises UsageError where experts cannot multiply in float8."""
    choice = choose(device, dtype, L, F)
    if choice.path != "fused" or dtype != torch.bfloat16:
        why = choice.why if device == "cuda" else gpu().why
        why = why if choice.path != "fused" else f"tokens are {dtype}, not bfloat16"
        raise UsageError(f"precision=float8 needs the fused kernels: {why}; use bfloat16")
    if not narrow(dtype, L, F):
        raise UsageError(
            f"precision=float8 takes experts of width L up to {WIDEST[dtype]}, and L and F in "
            f"steps of 16, not {L} and {F}; use bfloat16"
        )
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        raise UsageError(
            f"precision=float8 needs compute capability 9.0, not {found}; use bfloat16"
        )


def _has_grouped_matmuls() -> bool:
    """Elsewhere `grouped_mm` is a loop in PyTorch that waits for the device to read the sizes."""
    return torch.cuda.get_device_capability()[0] in (9, 10)


def _choice(x_NL: Tensor, gate_NK: Tensor, w_in_HEGFL: Tensor, w_out_HEFL: Tensor) -> Choice:
    H, E, _, Fh, L = w_in_HEGFL.shape
    others = {gate_NK.dtype, w_in_HEGFL.dtype, w_out_HEFL.dtype} - {torch.float32}
    if len(others - {torch.bfloat16}) == 1:
        others -= {torch.bfloat16}  # the one that decides
    return choose(x_NL.device.type, x_NL.dtype, L, Fh, H * E, *sorted(others, key=str)[:1])


def _path(*inputs: Tensor) -> ModuleType:
    """The module with `forward` and `backward` for x, gates and weights."""
    match _choice(*inputs).path:
        case "fused":
            from headway.kernels.gpu import experts as fused  # imports Triton

            return fused
        case "grouped":
            return experts_grouped
        case "cpp":
            return experts_cpp
        case "loop":
            return experts_loop


@torch.library.custom_op("headway::experts", mutates_args=())
def _forward(
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
    """(out `[N, L]`, pre-activations `[R, G·F]`, or `[0, G·F]` unless `keep`)."""
    inputs = (x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE)
    if precision == "float8":
        check_float8(x_NL.device.type, x_NL.dtype, x_NL.shape[1], w_in_HEGFL.shape[3])
        from headway.kernels.gpu import experts as fused

        return fused.forward(*inputs, activation, keep, precision)
    return _path(*inputs[:4]).forward(*inputs, activation, keep)


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
    """Gradients of x, gates, w_in and w_out."""
    inputs = (x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE)
    return _path(*inputs[:4]).backward(do_NL.contiguous(), *inputs, pre_R, activation, keep)


@_forward.register_fake
def _(x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE, activation, keep, *_):
    width = w_in_HEGFL.shape[2] * w_in_HEGFL.shape[3]
    out_NL = torch.empty_like(x_NL, memory_format=torch.contiguous_format)
    if _choice(x_NL, gate_NK, w_in_HEGFL, w_out_HEFL).path == "fused":
        keep = keep and not narrow(x_NL.dtype, x_NL.shape[1], w_out_HEFL.shape[2])
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
            return (experts_dense(x, gate, w_in, w_out, rows, ctx.activation),)

        grads = reference_grads(dense, inputs, ctx.needs_input_grad[:4], (do_NL,))
        return (*grads, *(None,) * 6)
    grads = _backward(do_NL, *ctx.saved_tensors, ctx.activation, ctx.keep)
    return (*grads, *(None,) * 6)


_forward.register_autograd(_autograd, setup_context=_save)
