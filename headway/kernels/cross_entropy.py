"""Cross-entropy of a linear head, in chunks: the logits of a large vocabulary are never whole in
memory.

T tokens · D width · V vocabulary. The gradients of a chunk are computed together with its loss,
while its logits exist; backward only scales them. Extra memory: one chunk of logits and, when
training, dx `[T, D]` and dW `[V, D]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # logits per chunk: 8 MiB in float32


def cross_entropy_reference(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, softcap: float = 0.0
) -> Tensor:
    """Sum over valid targets (≥ 0) of −log softmax(softcap(x·Wᵀ))[target]; whole logits."""
    logits = x_TD @ w_VD.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target_T, ignore_index=-1, reduction="sum")


def cross_entropy(x_TD: Tensor, w_VD: Tensor, target_T: Tensor, softcap: float = 0.0) -> Tensor:
    """Equal to `cross_entropy_reference`.

    Args:
        x_TD: `[T, D]`; its dtype is the dtype of the matmul, the softmax is float32 (or float64).
        w_VD: `[V, D]` float32 (or float64).
        target_T: int64 `[T]`; −1 is ignored.
        softcap: bounds logits to ±softcap; 0 is off.
    Returns: float32 (float64) scalar, the sum in nats.
    """
    return _CrossEntropy.apply(x_TD, w_VD, target_T, softcap)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_VD, target_T, softcap):
        wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        w = w_VD.to(x_TD.dtype)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x_TD) if needs_x else None
        dw = torch.zeros_like(w_VD) if needs_w else None
        total = torch.zeros((), dtype=wide, device=x_TD.device)
        rows = max(1, CHUNK_ELEMENTS // w.shape[0])
        for start in range(0, x_TD.shape[0], rows):
            at = slice(start, start + rows)
            x, target = x_TD[at], target_T[at]
            valid = target >= 0
            picked = target.clamp(min=0).unsqueeze(1)
            logits = (x @ w.T).to(wide)
            if softcap:
                logits.div_(softcap).tanh_()
                slope = 1 - logits.square() if needs_x or needs_w else None
                logits.mul_(softcap)
            lse = torch.logsumexp(logits, dim=1, keepdim=True)
            total += ((lse - logits.gather(1, picked)).squeeze(1) * valid).sum()
            if not (needs_x or needs_w):
                continue
            d_logits = logits.sub_(lse).exp_()
            d_logits.scatter_add_(1, picked, torch.full_like(lse, -1.0))
            d_logits.mul_(valid.unsqueeze(1))
            if softcap:
                d_logits.mul_(slope)
            d_logits = d_logits.to(x_TD.dtype)
            if dx is not None:
                torch.mm(d_logits, w, out=dx[at])
            if dw is not None:
                dw += d_logits.T @ x
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total):
        dx, dw = ctx.saved_tensors
        scaled = [None if g is None else g * d_total.to(g.dtype) for g in (dx, dw)]
        return scaled[0], scaled[1], None, None
