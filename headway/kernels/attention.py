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


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, first_BS: Tensor | None = None
) -> Tensor:
    """The same by its definition, any dtype; arguments and result as in `attention`."""
    (S, N, d), n_keys = q.shape[1:], k.shape[1]
    q, k, v = (t.transpose(1, 2).repeat_interleave(N // t.shape[2], 1) for t in (q, k, v))
    if mask is None:
        mask = _dense_mask(S, n_keys, q.device, first_BS)
    score = (q @ k.transpose(2, 3) / d**0.5).masked_fill(~mask, -torch.inf)
    return (torch.softmax(score, -1) @ v).transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, first_BS: Tensor | None = None
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
    Returns: `[B, S, N, d]` in q's dtype."""
    if transformed():
        return attention_reference(q, k, v, mask, first_BS)
    square = mask is None and q.shape[1] == k.shape[1]
    # bfloat16 is multiplied in pairs
    if square and q.shape[-1] % 2 == 0 and cpp_kernels().supports(q, k, v):
        return _forward(q, k, v, first_BS)[0]
    if first_BS is not None:
        mask = _dense_mask(q.shape[1], k.shape[1], q.device, first_BS)
    q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    y = F.scaled_dot_product_attention(
        q_, k_, v_, attn_mask=mask, is_causal=square and mask is None, enable_gqa=grouped
    )
    return y.transpose(1, 2)


@torch.library.custom_op("headway::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, first_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (out, log-sum-exp of the scores `[B, N, S]` float32)."""
    (q, k, v), sizes = _arguments(q, k, v)
    out, lse = torch.empty_like(q), _row_sums(q)
    cpp_kernels().call("attention_forward", q.dtype, q, k, v, first_BS, *sizes, out, lse)
    return out, lse


@torch.library.custom_op("headway::attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_BS: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    (q, k, v), sizes = _arguments(q, k, v)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tensors = (q, k, v, first_BS, out, d_out.contiguous(), lse)
    cpp_kernels().call("attention_backward", q.dtype, *tensors, *sizes, dq, dk, dv)
    return dq, dk, dv


@_forward.register_fake
def _(q, k, v, first_BS=None):
    return q.new_empty(q.shape), _row_sums(q)


@_backward.register_fake
def _(d_out, q, k, v, first_BS, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the output that is only kept
    ctx.save_for_backward(*inputs, *output)


def _autograd(ctx, d_out, _):
    if d_out is None:  # PyTorch may ask without a gradient
        return None, None, None, None
    q, k, v, first_BS, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():

        def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
            return (attention_reference(q, k, v, first_BS=first_BS),)

        needed = ctx.needs_input_grad[:3]
        return *reference_grads(reference, (q, k, v), needed, (d_out,)), None
    return *_backward(d_out, q, k, v, first_BS, out, lse), None


_forward.register_autograd(_autograd, setup_context=_save)


def _dense_mask(S: int, n_keys: int, device: torch.device, first_BS: Tensor | None) -> Tensor:
    query = torch.arange(n_keys - S, n_keys, device=device)
    mask = causal_mask(query, n_keys, first_BS)
    return mask if first_BS is None else mask.unsqueeze(1)


def _row_sums(q: Tensor) -> Tensor:
    B, S, N, _ = q.shape
    return q.new_empty(B, N, S, dtype=torch.float32)


def _arguments(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], tuple]:
    """Contiguous tensors, and the numbers that the C++ functions take: B, S, N, M, d, 1/√d."""
    (B, S, N, d), M = q.shape, k.shape[2]
    assert q.dtype == k.dtype == v.dtype and k.shape == v.shape == (B, S, M, d) and N % M == 0
    return [t.contiguous() for t in (q, k, v)], (B, S, N, M, d, d**-0.5)
