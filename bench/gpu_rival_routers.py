"""How others route on a GPU: scores in memory, or a fused top-k without tensor cores.

x_THL in the dtype of the matmuls, w_HEL float32, k  →  (index_THK int64, gate_THK float32: softmax
over the chosen scores)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu import on


def route_naive(x_THL: Tensor, w_HEL: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores `[T, H, E]` in float32, `torch.topk`, softmax over the chosen."""
    score_HTE = torch.bmm(x_THL.float().transpose(0, 1), w_HEL.transpose(1, 2))
    top = score_HTE.topk(k, dim=-1)
    return top.indices.transpose(0, 1), torch.softmax(top.values, -1).transpose(0, 1)


@triton.jit
def _ieee_topk(
    x,
    w,
    value,
    index,
    T,
    H,
    E,
    BT: tl.constexpr,
    BE: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
):
    """Scores by IEEE float32 products chunk by chunk; the best k as 64-bit keys, kept by a bitonic
    merge. K is a power of two."""
    h = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    col = tl.arange(0, L)
    inside = t[:, None] < T
    x_TL = tl.load(x + (t[:, None] * H + h) * L + col[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    best = tl.zeros((BT, K), tl.uint64)
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        w_LE = tl.load(w + (h * E + e[None, :]) * L + col[:, None], mask=e[None, :] < E, other=0.0)
        score = tl.dot(x_TL, w_LE, input_precision="ieee")
        bits = score.to(tl.uint32, bitcast=True)
        ordered = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
        key = (ordered.to(tl.uint64) << 32) | e[None, :].to(tl.uint64)
        key = tl.where(e[None, :] < E, key, tl.zeros_like(key))
        both = tl.join(best, tl.topk(key, K)).reshape(BT, 2 * K)
        best = tl.topk(both, K)
    ordered = (best >> 32).to(tl.uint32)  # pyright: ignore[reportOperatorIssue]
    bits = tl.where(ordered >> 31 != 0, ordered ^ 0x80000000, ordered ^ 0xFFFFFFFF)
    slot = (t[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    tl.store(value + slot, bits.to(tl.float32, bitcast=True), mask=inside)
    low = best & 0xFFFFFFFF  # pyright: ignore[reportOperatorIssue]
    tl.store(index + slot, low.to(tl.int64), mask=inside)


def _launch(L: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, warps and stages that need no stack on Hopper."""
    return (64, 32, 4, 3) if L <= 64 else (32, 64, 8, 3) if L <= 128 else (32, 32, 8, 1)


def route_ieee(x_THL: Tensor, w_HEL: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The fused top-k of arXiv 2602.04870: no `[T, H, E]` in memory, no tensor cores; forward.

    Errors: ValueError for widths and k that the published kernel does not take.
    """
    (T, H, L), E = x_THL.shape, w_HEL.shape[1]
    if L > 256:
        raise ValueError(f"the IEEE top-k is published for widths up to 256, not {L}")
    if L & (L - 1) or k & (k - 1):
        raise ValueError(f"widths and k are powers of two there, not {L} and {k}")
    value = torch.empty(T, H, k, dtype=torch.float32, device=x_THL.device)
    index = torch.empty(T, H, k, dtype=torch.int64, device=x_THL.device)
    rows, cols, warps, stages = _launch(L)
    grid = (triton.cdiv(T, rows), H)
    args = (x_THL, w_HEL, value, index, T, H, E)
    cols = max(cols, k)
    with on(x_THL):
        launch: Any = _ieee_topk[grid]  # of a kernel Triton's annotations know its parameters alone
        launch(*args, BT=rows, BE=cols, L=L, K=k, num_warps=warps, num_stages=stages)
    return index, torch.softmax(value, -1)
