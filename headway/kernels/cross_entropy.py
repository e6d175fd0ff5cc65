"""Cross-entropy and log-probabilities of a linear head, chunk by chunk: the full logits `[T, V]`
are never in memory.

T tokens · D width · V vocabulary. `cross_entropy` computes the gradients of a chunk together with
its loss, while its logits exist; backward only scales them. The gradients of `token_log_probs`
depend on a weight per token that only backward knows, so it computes the logits twice. Extra memory
of both: one chunk of logits and, when training, dx `[T, D]` and dW `[V, D]`."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.activation import softcap as capped
from headway.kernels.cpp import cpp_kernels
from headway.kernels.differentiate import transformed
from headway.kernels.gpu import gpu_kernels
from headway.kernels.packed import PackedWeight, packed_linear
from headway.kernels.precision import widen

CHUNK_ELEMENTS, CHUNK_ON_GPU = 1 << 21, 1 << 26
"""Logits per chunk, 8 MiB in float32; on GPUs 256, so that a step launches few kernels and the
gradient of the weight, read and written by each chunk, costs little."""


def cross_entropy_reference(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, softcap: float = 0.0
) -> Tensor:
    """Sum over valid targets (≥ 0) of −log softmax(softcap(x·Wᵀ))[target]; full logits."""
    logits = _logits_reference(x_TD, w_VD, softcap)
    return F.cross_entropy(logits, target_T, ignore_index=-1, reduction="sum")


def cross_entropy(x_TD: Tensor, w_VD: Tensor, target_T: Tensor, softcap: float = 0.0) -> Tensor:
    """Return what `cross_entropy_reference` does.

    Args:
        x_TD: `[T, D]`; its dtype is the dtype of the matmul, the softmax is float32 (or float64).
        w_VD: `[V, D]` float32 (or float64); narrower ones get the gradient of float32, rounded.
        target_T: int64 `[T]`; −1 is ignored.
        softcap: bounds logits to ±softcap; 0 is off.
    Returns: float32 (float64) scalar, the sum in nats."""
    if transformed():
        return cross_entropy_reference(x_TD, w_VD, target_T, softcap)
    return _CrossEntropy.apply(x_TD, w_VD, target_T, softcap)


def token_log_probs_reference(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, softcap: float = 0.0
) -> Tensor:
    """Return log softmax(softcap(x·Wᵀ))[target] of every token, 0 where the target is −1; full
    logits."""
    logits = _logits_reference(x_TD, w_VD, softcap)
    return -F.cross_entropy(logits, target_T, ignore_index=-1, reduction="none")


def token_log_probs(x_TD: Tensor, w_VD: Tensor, target_T: Tensor, softcap: float = 0.0) -> Tensor:
    """Return what `token_log_probs_reference` does, for losses that weigh tokens, as fine-tuning
    and policy gradients have them.

    Args: as for `cross_entropy`.
    Returns: float32 (float64) `[T]`, log-probabilities in nats; 0, without gradient, where the
        target is −1. Backward takes a weight per token and computes the logits again, chunk by
        chunk: `cross_entropy`'s memory, for one more matmul."""
    if transformed():
        return token_log_probs_reference(x_TD, w_VD, target_T, softcap)
    return _TokenLogProbs.apply(x_TD, w_VD, target_T, softcap)


def target_and_best_reference(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return log softmax(softcap(x·Wᵀ)) of each target, and the largest of each token, both 0 where
    the target is −1; full logits."""
    log_probs_TV = torch.log_softmax(_logits_reference(x_TD, w_VD, softcap), -1)
    target = log_probs_TV.gather(1, target_T.clamp(min=0).unsqueeze(1)).squeeze(1)
    return target * (target_T >= 0), log_probs_TV.amax(1) * (target_T >= 0)


@torch.no_grad()
def target_and_best(
    x_TD: Tensor, weight: Tensor | PackedWeight, target_T: Tensor, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return what `target_and_best_reference` does, without gradient, as float32 (float64) `[T]`
    twice, chunk by chunk. They are equal where, and only where, the target is the likeliest token,
    of several equal ones the first.

    Args: as for `cross_entropy`; a packed weight gives float32 logits."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    nats_T, gap_T = (torch.empty(len(x_TD), dtype=wide, device=x_TD.device) for _ in range(2))
    other_T = torch.empty(len(x_TD), dtype=torch.bool, device=x_TD.device)
    w = weight if isinstance(weight, PackedWeight) else weight.to(x_TD.dtype)
    for at in _chunks(x_TD, w.n_out if isinstance(w, PackedWeight) else len(w)):
        x, target = x_TD[at], target_T[at]
        logits = packed_linear(x, w, wide=True) if isinstance(w, PackedWeight) else x @ w.T
        # before the loss, which may use the memory of the logits
        chosen = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
        best, first = logits.max(1)
        other_T[at] = (first != target) & (target >= 0)
        chosen, best = (capped(widen(z), softcap) for z in (chosen, best))
        gap_T[at] = (best - chosen) * (target >= 0)
        nats_T[at] = _rows(logits, target, softcap, False)[0]
    best_T = gap_T - nats_T
    # another token is the likeliest, by a lead that the subtraction rounds away or by its index
    rounded_T = other_T & (best_T == -nats_T)
    best_T = torch.where(rounded_T, best_T.nextafter(torch.zeros_like(best_T)), best_T)
    return -nats_T, best_T


def _logits_reference(x_TD: Tensor, w_VD: Tensor, softcap: float) -> Tensor:
    """softcap(x·Wᵀ), float32 (float64) `[T, V]`."""
    logits = x_TD @ w_VD.to(x_TD.dtype).T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _chunks(x_TD: Tensor, V: int) -> Iterator[slice]:
    """Cut tokens into chunks of at most so many logits as their device takes at once."""
    most = CHUNK_ELEMENTS if x_TD.device.type == "cpu" else CHUNK_ON_GPU
    size = max(1, most // V)
    return (slice(start, start + size) for start in range(0, len(x_TD), size))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_VD, target_T, softcap):
        wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        w = w_VD.to(x_TD.dtype)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x_TD) if needs_x else None
        dw = torch.zeros_like(widen(w_VD)) if needs_w else None  # a sum over many chunks
        total = torch.zeros((), dtype=wide, device=x_TD.device)
        for at in _chunks(x_TD, len(w)):
            x, target = x_TD[at], target_T[at]
            loss, d_logits = _rows(x @ w.T, target, softcap, needs_x or needs_w)
            total = total + loss.sum()  # not in place: see `_RMSNorm` in norm.py
            _add_gradients(x, w, d_logits, None if dx is None else dx[at], dw)
        ctx.save_for_backward(dx, dw)
        ctx.stored = w_VD.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total):
        dx, dw = ctx.saved_tensors
        scaled = [None if g is None else g * d_total.to(g.dtype) for g in (dx, dw)]
        return scaled[0], None if scaled[1] is None else scaled[1].to(ctx.stored), None, None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_VD, target_T, softcap):
        wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        w = w_VD.to(x_TD.dtype)
        loss_T = torch.empty(len(x_TD), dtype=wide, device=x_TD.device)
        for at in _chunks(x_TD, len(w)):
            loss_T[at] = _rows(x_TD[at] @ w.T, target_T[at], softcap, False)[0]
        ctx.save_for_backward(x_TD, w_VD, target_T)
        ctx.softcap = softcap
        return -loss_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weight_T):
        x_TD, w_VD, target_T = ctx.saved_tensors
        w = w_VD.to(x_TD.dtype)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x_TD) if needs_x else None
        dw = torch.zeros_like(widen(w_VD)) if needs_w else None
        for at in _chunks(x_TD, len(w)):
            x = x_TD[at]
            _, d_logits = _rows(x @ w.T, target_T[at], ctx.softcap, True)
            assert d_logits is not None
            d_logits.mul_(-weight_T[at, None])
            _add_gradients(x, w, d_logits, None if dx is None else dx[at], dw)
        return dx, None if dw is None else dw.to(w_VD.dtype), None, None


def _add_gradients(
    x: Tensor, w: Tensor, d_logits: Tensor | None, dx: Tensor | None, dw: Tensor | None
) -> None:
    """Write the gradient of a chunk's tokens to `dx` and add that of the weight to `dw`."""
    if d_logits is not None and dx is not None:
        torch.mm(d_logits, w, out=dx)
    if d_logits is not None and dw is not None:
        dw += d_logits.T @ x


def _rows(
    logits_TV: Tensor, target_T: Tensor, softcap: float, back: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of every row, float32 (or float64) `[T]`, and with `back` the gradient of its
    logits, in their dtype and perhaps in their memory; else None."""
    if gpu_kernels().supports(logits_TV) or cpp_kernels().supports(logits_TV):
        loss_T = _rows_native(logits_TV, target_T, softcap, back)
        return loss_T, logits_TV if back else None
    logits = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    valid = target_T >= 0
    picked = target_T.clamp(min=0).unsqueeze(1)
    slope = None
    if softcap:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if back else None
        logits.mul_(softcap)
    lse = torch.logsumexp(logits, dim=1, keepdim=True)
    loss_T = (lse - logits.gather(1, picked)).squeeze(1) * valid
    if not back:
        return loss_T, None
    d_logits = logits.sub_(lse).exp_()
    d_logits.scatter_add_(1, picked, torch.full_like(lse, -1.0))
    d_logits.mul_(valid.unsqueeze(1))
    if slope is not None:
        d_logits.mul_(slope)
    return loss_T, d_logits.to(logits_TV.dtype)


@torch.library.custom_op("headway::cross_entropy_rows", mutates_args=("logits_TV",))
def _rows_native(logits_TV: Tensor, target_T: Tensor, softcap: float, back: bool) -> Tensor:
    """Run the kernel, in Triton or C++; a target beyond the vocabulary gives NaN."""
    if gpu_kernels().supports(logits_TV):
        from headway.kernels.gpu import cross_entropy as on_gpu  # imports Triton

        return on_gpu.rows(logits_TV, target_T.contiguous(), softcap, back)
    loss_T = logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32)
    arguments = (logits_TV, target_T.contiguous(), *logits_TV.shape, float(softcap), int(back))
    cpp_kernels().call("cross_entropy", logits_TV.dtype, *arguments, loss_T)
    return loss_T


@_rows_native.register_fake
def _(logits_TV, target_T, softcap, back):
    return logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32)
