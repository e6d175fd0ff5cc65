"""Causal softmax attention on `[B, S, heads, d]`, as FlashAttention-2 (arXiv 2307.08691): the
backward recomputes the weights from the row sums, nothing of size S × S is kept.

B sequences · S positions · N query heads · M key/value heads · d head width.

    s = q·kᵀ/√d;  lse = log Σ_{j ≤ i} exp s;  P = exp(s − lse);  out = P·v

Backward, given do:

    δ = Σ_d do·out;  dS = P·(do·vᵀ − δ)/√d;  dq = dS·k;  dk = dSᵀ·q;  dv = Pᵀ·do

Query i sees keys first[i] … i: `first` is 0, or where its window or its document begins. On CPUs
with a C++ compiler `cpu/attention.cpp` does both passes, in float32 and bfloat16, and skips what no
query sees; elsewhere PyTorch's SDPA does, with a dense mask where `first` is not 0. Scores and sums
are float32; P and dS are rounded to q's dtype for the matmuls, which accumulate in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.cpp import cpp_kernels
from headway.kernels.differentiate import reference_grads, transformed


def causal_mask(query: Tensor, n_keys: int, first: Tensor | None = None) -> Tensor:
    """Return a boolean mask `[…, S, keys]`, true where a query sees a key.

    Args: query: positions of the queries, `[S]` or `[B, S]`. first: the first key that each query
    sees, broadcast to the queries; None is 0."""
    key = torch.arange(n_keys, device=query.device)
    mask = key <= query.unsqueeze(-1)
    return mask if first is None else mask & (key >= first.unsqueeze(-1))


def reads_first(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel for S keys reads `first_BS`, so that no dense mask is made."""
    return device.type == "cpu" and dtype in cpp_kernels().dtypes


def with_sinks(mask: Tensor, sinks_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what SDPA adds to the scores, `[…, N, S, keys + 1]`, if a key of zeros follows the
    others: the sink of each head where a query sees keys."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    if mask.dim() == 2 or mask.shape[-3] == 1:
        bias = bias.expand(*mask.shape[:-3], len(sinks_N), *mask.shape[-2:])
    sink = sinks_N.to(dtype).view(-1, 1, 1).expand(*bias.shape[:-1], 1)
    return torch.cat((bias, sink), -1)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    first_BS: Tensor | None = None,
    sinks_N: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same by its definition, any dtype; arguments and result as in `attention`."""
    (S, N, d), n_keys = q.shape[1:], k.shape[1]
    q, k, v = (t.transpose(1, 2).repeat_interleave(N // t.shape[2], 1) for t in (q, k, v))
    if mask is None:
        mask = _dense_mask(S, n_keys, q.device, first_BS)
    score = q @ k.transpose(2, 3) * (d**-0.5 if scale is None else scale)
    score = score.masked_fill(~mask, -torch.inf)
    if sinks_N is not None:
        sink = sinks_N.to(score.dtype).view(-1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat((score, sink), -1)
    return (torch.softmax(score, -1)[..., :n_keys] @ v).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    first_BS: Tensor | None = None,
    sinks_N: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of S queries to the keys that `mask` allows.

    Args:
        q: `[B, S, N, d]`; its dtype is the dtype of the matmuls.
        k, v: `[B, keys, M, d]` in q's dtype; N is a multiple of M, and N/M successive query heads
        share a key/value head.
        mask: boolean, broadcast to `[B, N, S, keys]`, true where a query may look; needs PyTorch's
        SDPA. None is causal: with as many keys as queries, or with one query after the last key.
        first_BS: int32 `[B, S]`, only without a mask and with as many keys as queries: the first
        key that a query sees, between 0 and the query, and never below that of the query before.
        sinks_N: float32 (float64), one more score per head, which takes weight and gives nothing.
        scale: of the scores; None is 1/√d.
    Returns: `[B, S, N, d]` in q's dtype."""
    if transformed():
        return attention_reference(q, k, v, mask, first_BS, sinks_N, scale)
    square = mask is None and q.shape[1] == k.shape[1]
    # bfloat16 is multiplied in pairs
    if square and q.shape[-1] % 2 == 0 and cpp_kernels().supports(q, k, v):
        sinks_N = None if sinks_N is None else sinks_N.float()
        return _forward(q, k, v, first_BS, sinks_N, scale)[0]
    if first_BS is not None or (mask is None and sinks_N is not None):
        mask = _dense_mask(q.shape[1], k.shape[1], q.device, first_BS)
    if sinks_N is not None and mask is not None:
        mask = with_sinks(mask, sinks_N, q.dtype)
        k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (k, v))
    q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    y = F.scaled_dot_product_attention(
        q_, k_, v_, mask, is_causal=square and mask is None, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2)


@torch.library.custom_op("headway::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_BS: Tensor | None = None,
    sinks_N: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, log-sum-exp of the scores and the sink `[B, N, S]` float32)."""
    (q, k, v), sizes = _arguments(q, k, v, scale)
    out, lse = torch.empty_like(q), _row_sums(q)
    cpp_kernels().call("attention_forward", q.dtype, q, k, v, first_BS, *sizes, out, lse)
    if sinks_N is None:
        return out, lse
    total = torch.logaddexp(lse, sinks_N.unsqueeze(1))
    share = torch.exp(lse - total).transpose(1, 2).unsqueeze(-1)
    return (out * share).to(q.dtype), total


@torch.library.custom_op("headway::attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_BS: Tensor | None,
    sinks_N: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the sinks. A sink is a key whose value is 0: the others'
    equations hold as they are, with the log-sum-exp that it is part of."""
    (q, k, v), sizes = _arguments(q, k, v, scale)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tensors = (q, k, v, first_BS, out, d_out.contiguous(), lse)
    cpp_kernels().call("attention_backward", q.dtype, *tensors, *sizes, dq, dk, dv)
    if sinks_N is None:
        return dq, dk, dv, lse.new_empty(0)
    delta_BNS = torch.linalg.vecdot(out.float(), d_out.float()).transpose(1, 2)
    return dq, dk, dv, -(torch.exp(sinks_N.unsqueeze(1) - lse) * delta_BNS).sum((0, 2))


@_forward.register_fake
def _(q, k, v, first_BS=None, sinks_N=None, scale=None):
    return q.new_empty(q.shape), _row_sums(q)


@_backward.register_fake
def _(d_out, q, k, v, first_BS, sinks_N, out, lse, scale):
    d_sinks = lse.new_empty(0 if sinks_N is None else sinks_N.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the output that is only kept
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, d_out, _):
    if d_out is None:  # PyTorch may ask without a gradient
        return (None,) * 6
    q, k, v, first_BS, sinks_N, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():

        def reference(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> tuple[Tensor]:
            sinks_N = sinks[0] if sinks else None
            return (attention_reference(q, k, v, None, first_BS, sinks_N, ctx.scale),)

        inputs = (q, k, v) if sinks_N is None else (q, k, v, sinks_N)
        needed = (*ctx.needs_input_grad[:3], True)[: len(inputs)]
        dq, dk, dv, *d_sinks = reference_grads(reference, inputs, needed, (d_out,))
        return dq, dk, dv, None, d_sinks[0] if d_sinks else None, None
    tensors = (q, k, v, first_BS, sinks_N, out, lse)
    dq, dk, dv, d_sinks_N = _backward(d_out, *tensors, ctx.scale)
    return dq, dk, dv, None, None if sinks_N is None else d_sinks_N, None


_forward.register_autograd(_autograd, setup_context=_save)


def _dense_mask(S: int, n_keys: int, device: torch.device, first_BS: Tensor | None) -> Tensor:
    query = torch.arange(n_keys - S, n_keys, device=device)
    mask = causal_mask(query, n_keys, first_BS)
    return mask if first_BS is None else mask.unsqueeze(1)


def _row_sums(q: Tensor) -> Tensor:
    B, S, N, _ = q.shape
    return q.new_empty(B, N, S, dtype=torch.float32)


def _arguments(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[list[Tensor], tuple]:
    """Contiguous tensors, and the numbers that the C++ functions take: B, S, N, M, d, scale."""
    (B, S, N, d), M = q.shape, k.shape[2]
    assert q.dtype == k.dtype == v.dtype and k.shape == v.shape == (B, S, M, d) and N % M == 0
    scale = d**-0.5 if scale is None else scale
    return [t.contiguous() for t in (q, k, v)], (B, S, N, M, d, scale)
