"""A router: which experts a sub-token visits, with what gates, and how evenly.

On GPUs one pass over the tokens that writes nothing of size T×E (`gpu/route.py`). Elsewhere logits
`[T, H, E]`, then one pass over them each way in `cpu/route.cpp`, some forty operators in PyTorch.

T tokens · H heads · L width · E experts per head · K chosen. Scores and gates are float32 (float64
in references)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.config import RouterGate
from headway.kernels.capture import capturing
from headway.kernels.cpp import cpp_kernels, undispatched
from headway.kernels.differentiate import reference_grads, transformed
from headway.kernels.gpu import gpu_kernels
from headway.kernels.gpu.ops import GATES, route_tokens
from headway.kernels.permute import count
from headway.kernels.precision import widen, without_autocast
from headway.kernels.topk import top_k


class Routed(NamedTuple):
    """The selected experts, their gates and the statistics over tokens."""

    index_THK: Tensor
    """int64 (int32 from the GPU kernels) `[T, H, K]`, best first."""
    gate_THK: Tensor
    """`[T, H, K]`, with gradient."""
    prob_HE: Tensor
    """Mean over tokens of the scores normalised to sum 1; `[H, E]`, with gradient."""
    z_H: Tensor
    """Mean over tokens of logsumexp(logits)²; `[H]`, with gradient."""
    entropy_H: Tensor
    """Mean over tokens of the entropy of the normalised scores, over log E; `[H]`."""
    counts_HE: Tensor
    """Rows that chose each expert; `[H, E]` in the dtype of the logits."""


def route_reference(
    logits_THE: Tensor,
    bias_HE: Tensor,
    index_THK: Tensor | None,
    k: int,
    gate: RouterGate,
    renormalize: bool,
    scale: float,
) -> Routed:
    """Route in PyTorch, by the definition and with autograd's gradient. Arguments as in
    `route_logits`, of any float dtype."""
    T, H, E = logits_THE.shape
    sigmoid = gate == "sigmoid"
    score_THE = torch.sigmoid(logits_THE) if sigmoid else logits_THE
    if index_THK is None:
        index_THK = top_k((score_THE + bias_HE).detach(), k)
    if sigmoid:
        prob_THE = score_THE / score_THE.sum(-1, keepdim=True).clamp(min=1e-20)
    else:
        prob_THE = torch.softmax(logits_THE, dim=-1)
    match gate:
        case "topk_softmax":
            gate_THK = torch.softmax(logits_THE.gather(-1, index_THK), dim=-1)
        case "softmax_topk":
            gate_THK = prob_THE.gather(-1, index_THK)
        case "sigmoid":
            gate_THK = score_THE.gather(-1, index_THK)
    if renormalize:
        gate_THK = gate_THK / gate_THK.sum(-1, keepdim=True).clamp(min=1e-20)
    group = index_THK + torch.arange(H, device=index_THK.device).view(1, H, 1) * E
    prob = prob_THE.detach()
    return Routed(
        index_THK=index_THK,
        gate_THK=gate_THK * scale if scale != 1.0 else gate_THK,
        prob_HE=prob_THE.sum(0) / max(T, 1),
        z_H=torch.logsumexp(logits_THE, dim=-1).square().sum(0) / max(T, 1),
        entropy_H=-torch.special.xlogy(prob, prob).sum((0, 2)) / (max(T, 1) * math.log(max(E, 2))),
        counts_HE=count(group, H * E).view(H, E).to(prob.dtype),
    )


def route(
    x: Tensor,
    w_HEL: Tensor,
    bias_HE: Tensor,
    index_THK: Tensor | None,
    k: int,
    gate: RouterGate,
    renormalize: bool,
    scale: float,
) -> Routed:
    """Return `route_logits` of `logits(x, w_HEL)`.

    Args:
        x: `[T, H, L]`, or `[T, L]` that every head reads; float32, bfloat16 (float64).
        w_HEL: `[H, E, L]` float32 (float64); a narrower dtype is widened, as the bias is.
        the others as in `route_logits`. The GPU kernels cannot look at a replayed index without
        waiting for the device: where it is no expert its gate is NaN."""
    w_HEL, bias_HE = widen(w_HEL), widen(bias_HE)
    arguments = (bias_HE, index_THK, k, gate, renormalize, float(scale))
    if keeps_no_logits(x, w_HEL, bias_HE):
        *rest, chosen_THK, _, _ = route_tokens(x, w_HEL, *arguments)
        return Routed(chosen_THK, *rest)
    return route_logits(logits(x, w_HEL), *arguments)


def keeps_no_logits(x: Tensor, w_HEL: Tensor, bias_HE: Tensor) -> bool:
    """Return whether `route` keeps nothing of size T×E for backward."""
    if transformed() or not gpu_kernels().supports(x, w_HEL, bias_HE):
        return False
    return widen(w_HEL).dtype == widen(bias_HE).dtype == torch.float32


def logits(x: Tensor, w_HEL: Tensor) -> Tensor:
    """Return x times the weights in float32 (float64): `[T, H, L]` (or `[T, L]`, the same for all
    heads) times `[H, E, L]` → `[T, H, E]`."""
    wide = torch.promote_types(torch.promote_types(x.dtype, w_HEL.dtype), torch.float32)
    x, w_HEL = x.to(wide), w_HEL.to(wide)
    with without_autocast(x):
        if x.dim() == 2:
            return F.linear(x, w_HEL.flatten(0, 1)).unflatten(-1, w_HEL.shape[:2])
        return torch.bmm(x.transpose(0, 1), w_HEL.transpose(1, 2)).transpose(0, 1)


def route_logits(
    logits_THE: Tensor,
    bias_HE: Tensor,
    index_THK: Tensor | None,
    k: int,
    gate: RouterGate,
    renormalize: bool,
    scale: float,
) -> Routed:
    """Return what `route_reference` does: the same experts chosen, the rest to 1e-6.

    Args:
        logits_THE: `[T, H, E]` float32 (float64).
        bias_HE: `[H, E]` in the same dtype, added to the scores for the selection only.
        index_THK: int64 `[T, H, K]` in 0 … E − 1 replays a selection; None selects the k largest of
        score + bias, ties to the lowest index.
        gate, renormalize, scale: see `RouterConfig`. The score is σ(logit) with `sigmoid`, else the
        logit.
    Raises: IndexError where a replayed index is no expert (RuntimeError on PyTorch's path); under a
    capture nobody looks."""
    bias_HE = bias_HE.to(logits_THE.dtype)
    arguments = (logits_THE, bias_HE, index_THK, k, gate, renormalize, float(scale))
    takes = cpp_kernels().supports(logits_THE, bias_HE) and logits_THE.dtype == torch.float32
    if takes and not transformed():
        *rest, chosen_THK = (_route if undispatched(logits_THE) else _forward)(*arguments)
        return Routed(chosen_THK, *rest)
    return route_reference(*arguments)


def _route(
    logits_THE: Tensor,
    bias_HE: Tensor,
    index_THK: Tensor | None,
    k: int,
    gate: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `Routed`, the index last."""
    T, H, E = logits_THE.shape
    K = k
    if index_THK is not None:
        K, index_THK = index_THK.shape[-1], index_THK.long().contiguous()
        looks = index_THK.numel() and not capturing()
        if looks and not 0 <= int(index_THK.min()) <= int(index_THK.max()) < E:
            raise IndexError(f"a replayed index lies outside 0 … {E - 1}")
    logits, token, head = _laid(logits_THE)
    out, inputs = _empty(logits_THE, K), (logits, bias_HE.contiguous(), index_THK)
    sizes = (T, H, E, K, token, head, GATES.index(gate), int(renormalize), scale)
    cpp_kernels().call("route", torch.float32, *inputs, *sizes, *out)
    return out


_forward = torch.library.custom_op("headway::route", _route, mutates_args=())


@torch.library.custom_op("headway::route_backward", mutates_args=())
def _backward(
    logits_THE: Tensor,
    index_THK: Tensor,
    d_gate_THK: Tensor | None,
    d_prob_HE: Tensor | None,
    d_z_H: Tensor | None,
    gate: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """Return the gradient of the logits; a gradient that is None is 0."""
    (T, H, E), K = logits_THE.shape, index_THK.shape[-1]
    logits, token, head = _laid(logits_THE)
    d_logits = _like(logits_THE)
    grads = (None if d is None else d.contiguous() for d in (d_gate_THK, d_prob_HE, d_z_H))
    sizes = (T, H, E, K, token, head, GATES.index(gate), int(renormalize), scale)
    inputs = (logits, index_THK.contiguous(), *grads)
    cpp_kernels().call("route_backward", torch.float32, *inputs, *sizes, _laid(d_logits)[0])
    return d_logits


@_forward.register_fake
def _(logits_THE, bias_HE, index_THK, k, gate, renormalize, scale):
    return _empty(logits_THE, k if index_THK is None else index_THK.shape[-1])


@_backward.register_fake
def _(logits_THE, index_THK, d_gate_THK, d_prob_HE, d_z_H, gate, renormalize, scale):
    return _like(logits_THE)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the kernel skips what has no gradient
    ctx.mark_non_differentiable(*output[3:])
    logits_THE, _, _, _, *ctx.options = inputs
    ctx.save_for_backward(logits_THE, output[-1])


def _autograd(ctx, d_gate_THK, d_prob_HE, d_z_H, *_):
    grads = (d_gate_THK, d_prob_HE, d_z_H)
    if torch.is_grad_enabled():
        logits_THE, index_THK = ctx.saved_tensors
        given = (index_THK, grads, ctx.options)
        return *route_twice(lambda z: z, (logits_THE,), (True,), *given), *(None,) * 6
    return (_backward(*ctx.saved_tensors, *grads, *ctx.options), *(None,) * 6)


_forward.register_autograd(_autograd, setup_context=_save)


def route_twice(
    logits_of: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    index_THK: Tensor,
    grads: Sequence[Tensor | None],
    options: Sequence,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of what the logits are made of, for a given selection; they can be
    differentiated again.

    Args: grads: of gates, mean scores and z, None is 0; options: gate, renormalize, scale."""

    def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
        logits_THE, index = logits_of(*inputs), index_THK.long()
        bias_HE = torch.zeros_like(logits_THE[0])  # only selects
        routed = route_reference(logits_THE, bias_HE, index, index.shape[-1], *options)
        return routed.gate_THK, routed.prob_HE, routed.z_H

    return reference_grads(reference, inputs, needed, grads)


def _empty(logits_THE: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate what `_route` returns."""
    T, H, E = logits_THE.shape
    shapes = ((T, H, K), (H, E), (H,), (H,), (H, E))
    gate_THK, prob_HE, z_H, entropy_H, counts_HE = (logits_THE.new_empty(s) for s in shapes)
    index_THK = logits_THE.new_empty(T, H, K, dtype=torch.int64)
    return gate_THK, prob_HE, z_H, entropy_H, counts_HE, index_THK


def _by_head(logits_THE: Tensor) -> bool:
    """Return whether one head's tokens are contiguous, as `bmm` over heads leaves them."""
    return logits_THE.transpose(0, 1).is_contiguous()


def _laid(logits_THE: Tensor) -> tuple[Tensor, int, int]:
    """Return the same numbers contiguous, without a copy in either order, and the distance from a
    token and from a head to the next."""
    T, H, E = logits_THE.shape
    if _by_head(logits_THE):
        return logits_THE.transpose(0, 1), E, T * E
    return logits_THE.contiguous(), H * E, E


def _like(logits_THE: Tensor) -> Tensor:
    """Allocate the gradient of logits, in their memory order."""
    memory_format = torch.preserve_format if _by_head(logits_THE) else torch.contiguous_format
    return torch.empty_like(logits_THE, memory_format=memory_format)
