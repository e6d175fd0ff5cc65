"""The custom operators of the router and the row sort on the GPU. Triton is imported when one of
them runs.

T tokens · H heads · L width · E experts per head · K chosen · R = T·H·K rows · N = T·H sub-tokens.
"""

import torch
from torch import Tensor

from headway.kernels.gpu import on

GATES = ("topk_softmax", "softmax_topk", "sigmoid")
"""Gates by the numbers that the router's kernels know them by, in Triton and in C++."""


@torch.library.custom_op("headway::sort_rows_gpu", mutates_args=())
def sort_rows(index_THK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `slot_R`, `row_NK`, `counts_HE` of `kernels.permute.Rows`, all int32."""
    from headway.kernels.gpu import permute as rows

    return rows.sort_rows(index_THK, n_experts)


@sort_rows.register_fake
def _(index_THK, n_experts):
    (T, H, K), make = index_THK.shape, index_THK.new_empty
    shapes = ((T * H * K,), (T * H, K), (H, n_experts))
    return tuple(make(shape, dtype=torch.int32) for shape in shapes)


Routing = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("headway::route_tokens", mutates_args=())
def route_tokens(
    x: Tensor,
    w_HEL: Tensor,
    bias_HE: Tensor,
    index_THK: Tensor | None,
    k: int,
    gate: str,
    renormalize: bool,
    scale: float,
) -> Routing:
    """Return the fields of `Routed`, the index (int32) last of them, and what backward needs: the
    chosen logits `[T, H, K]` (empty for `topk_softmax`, whose gates tell as much) and one or two
    numbers of each row `[C, T, H]`, its logsumexp and, for `sigmoid`, its sum of scores."""
    from headway.kernels.gpu import route

    out = _empty(x, w_HEL, index_THK, k, gate)
    with on(x):
        route.forward(x, w_HEL, bias_HE, index_THK, out, gate, renormalize, scale)
    return out


@torch.library.custom_op("headway::route_tokens_backward", mutates_args=())
def _backward(
    x: Tensor,
    w_HEL: Tensor,
    index_THK: Tensor,
    saved_THK: Tensor,
    rows_CTH: Tensor,
    d_gate_THK: Tensor | None,
    d_prob_HE: Tensor | None,
    d_z_H: Tensor | None,
    gate: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the tokens and of the weights; a gradient that is None is 0.
    `saved_THK`: the chosen logits, or the gates of `topk_softmax`."""
    from headway.kernels.gpu import route_backward

    out = _like(x), _like(w_HEL)
    saved, grads = (x, w_HEL, index_THK, saved_THK, rows_CTH), (d_gate_THK, d_prob_HE, d_z_H)
    with on(x):
        route_backward.backward(*saved, *grads, gate, renormalize, scale, *out)
    return out


@route_tokens.register_fake
def _(x, w_HEL, bias_HE, index_THK, k, gate, renormalize, scale):
    return _empty(x, w_HEL, index_THK, k, gate)


@_backward.register_fake
def _(x, w_HEL, *rest):
    return _like(x), _like(w_HEL)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the kernels skip what has no gradient
    ctx.mark_non_differentiable(*output[3:])
    x, w_HEL, _, _, _, *ctx.options = inputs
    gate_THK, _, _, _, _, index_THK, logit_THK, rows_CTH = output
    saved_THK = gate_THK if ctx.options[0] == "topk_softmax" else logit_THK
    ctx.save_for_backward(x, w_HEL, index_THK, saved_THK, rows_CTH)


def _autograd(ctx, d_gate_THK, d_prob_HE, d_z_H, *_):
    grads = (d_gate_THK, d_prob_HE, d_z_H)
    if torch.is_grad_enabled():  # a second derivative is wanted: through the logits, in PyTorch
        from headway.kernels.route import logits, route_twice

        x, w_HEL, index_THK, _, _ = ctx.saved_tensors
        given = (ctx.needs_input_grad[:2], index_THK, grads, ctx.options)
        return *route_twice(logits, (x, w_HEL), *given), *(None,) * 6
    return (*_backward(*ctx.saved_tensors, *grads, *ctx.options), *(None,) * 6)


route_tokens.register_autograd(_autograd, setup_context=_save)


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _empty(x: Tensor, w_HEL: Tensor, index_THK: Tensor | None, k: int, gate: str) -> Routing:
    """Allocate what `route_tokens` returns."""
    T, (H, E, _) = x.shape[0], w_HEL.shape
    K = k if index_THK is None else index_THK.shape[-1]
    n_saved = 0 if gate == "topk_softmax" else K
    shapes = ((T, H, K), (H, E), (H,), (H,), (H, E))
    gate_THK, prob_HE, z_H, entropy_H, counts_HE = (w_HEL.new_empty(shape) for shape in shapes)
    chosen_THK = w_HEL.new_empty(T, H, K, dtype=torch.int32)
    rows_CTH = w_HEL.new_empty(2 if gate == "sigmoid" else 1, T, H)
    saved_THK = w_HEL.new_empty(T, H, n_saved)
    return gate_THK, prob_HE, z_H, entropy_H, counts_HE, chosen_THK, saved_THK, rows_CTH
