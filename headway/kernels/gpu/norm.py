"""RMSNorm in one pass over memory each way, alone and before a rotation; equations in ../norm.py.

Rows of x are tokens of W kinds that follow one another, one row of weights `[W, L]` each. A program
takes tiles of BT tokens of one kind, whole rows: BL columns, or with a rotation its two halves of
BL. Everything is float32 between the load and the store. A program's part of the weights' gradient
stays in registers while it walks over its tiles; the parts are then summed in their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.gpu import on
from headway.kernels.gpu.arith import narrow, widen

TILE, PROGRAMS = 4096, 528
"""Elements of a tile; programs of a backward pass, four on each multiprocessor of an H100."""


@triton.jit
def _halves(p, row, col, inside, L, ROTATE: tl.constexpr):
    """Load rows of `[R, L]` in float32: their first and second halves, or whole and twice so."""
    at = p + row[:, None] * L + col[None, :]
    first = widen(tl.load(at, mask=inside, other=0.0))
    second = first
    if ROTATE:
        second = widen(tl.load(at + L // 2, mask=inside, other=0.0))
    return first, second


@triton.jit
def _tables(cos, sin, row, col, inside, heads, S, L):
    """Load cosine and sine `[S, L/2]` of rows `[B, S, heads]`."""
    at = (row // heads % S)[:, None] * (L // 2) + col[None, :]
    return tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)


@triton.jit
def _weights(weight, kind, col, L, ROTATE: tl.constexpr):
    width = L // 2 if ROTATE else L
    first = tl.load(weight + kind * L + col, mask=col < width, other=0.0)
    second = first
    if ROTATE:
        second = tl.load(weight + kind * L + L // 2 + col, mask=col < width, other=0.0)
    return first[None, :], second[None, :]


@triton.jit
def _put(p, row, col, inside, L, first, second, ROTATE: tl.constexpr):
    at = p + row[:, None] * L + col[None, :]
    tl.store(at, narrow(first, p.dtype.element_ty), mask=inside)
    if ROTATE:
        tl.store(at + L // 2, narrow(second, p.dtype.element_ty), mask=inside)


@triton.jit
def norm_forward(
    x, weight, cos, sin, out, scale, N, W, L, heads, S, eps,
    BT: tl.constexpr, BL: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Compute a tile of `out` and its rows' 1/sqrt(mean(x²) + eps)."""
    t, kind, col = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1), tl.arange(0, BL)
    row = t.to(tl.int64) * W + kind
    width = L // 2 if ROTATE else L
    inside = (t < N)[:, None] & (col < width)[None, :]
    a, b = _halves(x, row, col, inside, L, ROTATE)
    squares = tl.sum(a * a, 1)
    if ROTATE:
        squares += tl.sum(b * b, 1)
    s = 1.0 / tl.sqrt(squares / L + eps)
    tl.store(scale + row, s, mask=t < N)
    w_a, w_b = _weights(weight, kind, col, L, ROTATE)
    a, b = a * s[:, None] * w_a, b * s[:, None] * w_b
    if ROTATE:
        c, d = _tables(cos, sin, row, col, inside, heads, S, L)
        _put(out, row, col, inside, L, a * c - b * d, b * c + a * d, ROTATE)
    else:
        _put(out, row, col, inside, L, a, b, ROTATE)


@triton.jit
def norm_backward(
    dy, x, weight, scale, cos, sin, dx, parts, N, W, L, heads, S, walk,
    BT: tl.constexpr, BL: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Compute dx of `walk` tiles, and what they add to the gradient of the weights."""
    program, kind, col = tl.program_id(0), tl.program_id(1), tl.arange(0, BL)
    width = L // 2 if ROTATE else L
    w_a, w_b = _weights(weight, kind, col, L, ROTATE)
    sum_a, sum_b = tl.zeros([BL], tl.float32), tl.zeros([BL], tl.float32)
    for tile in range(program * walk, tl.minimum((program + 1) * walk, (N + BT - 1) // BT)):
        t = tile * BT + tl.arange(0, BT)
        row = t.to(tl.int64) * W + kind
        inside = (t < N)[:, None] & (col < width)[None, :]
        s = tl.load(scale + row, mask=t < N, other=0.0)[:, None]
        a, b = _halves(x, row, col, inside, L, ROTATE)
        d_a, d_b = _halves(dy, row, col, inside, L, ROTATE)
        if ROTATE:
            c, d = _tables(cos, sin, row, col, inside, heads, S, L)
            back = d_a * c + d_b * d
            d_b = d_b * c - d_a * d
            d_a = back
        a, b = a * s, b * s
        sum_a += tl.sum(d_a * a, 0)
        sum_b += tl.sum(d_b * b, 0)
        d_a, d_b = d_a * w_a, d_b * w_b
        dot = tl.sum(d_a * a, 1)
        if ROTATE:
            dot += tl.sum(d_b * b, 1)
        dot = (dot / L)[:, None]
        _put(dx, row, col, inside, L, (d_a - a * dot) * s, (d_b - b * dot) * s, ROTATE)
    at = parts + (program * W + kind).to(tl.int64) * L + col
    tl.store(at, sum_a, mask=col < width)
    if ROTATE:
        tl.store(at + L // 2, sum_b, mask=col < width)


def forward(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor | None = None, sin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `norm._norm` does."""
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    sizes, tiles, W = _sizes(x, weight, cos)
    if x.numel():
        with on(x):
            norm_forward[(tiles, W)](
                x=x, weight=weight, cos=cos, sin=sin, out=out, scale=scale, eps=eps, **sizes
            )
    return out, scale


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight)
    sizes, tiles, W = _sizes(x, weight, cos)
    walk = triton.cdiv(tiles * W, PROGRAMS)
    programs = triton.cdiv(tiles, walk)
    parts = weight.new_empty(programs, *weight.shape)
    with on(x):
        norm_backward[(programs, W)](
            dy=dy, x=x, weight=weight, scale=scale, cos=cos, sin=sin, dx=dx, parts=parts,
            walk=walk, **sizes,
        )  # fmt: skip
    return dx, parts.sum(0)


def _sizes(x: Tensor, weight: Tensor, cos: Tensor | None) -> tuple[dict[str, int], int, int]:
    """Return the sizes that both kernels take, the tiles of one kind, and the kinds."""
    L = weight.shape[-1]
    W = weight.numel() // L
    N = x.numel() // weight.numel() if weight.numel() else 0
    S, heads = (1, 1) if cos is None else x.shape[-3:-1]
    BL = max(16, triton.next_power_of_2(L if cos is None else L // 2))
    BT = max(1, min(64, TILE // (BL if cos is None else 2 * BL)))
    sizes = {"N": N, "W": W, "L": L, "heads": heads, "S": S, "BT": BT, "BL": BL}
    warps = 8 if BT * BL * (1 if cos is None else 2) > 2048 else 4
    return sizes | {"ROTATE": cos is not None, "num_warps": warps}, triton.cdiv(N, BT), W
