"""The scores of a tile of tokens by a chunk of experts, on chip, and how the router's kernels are
cut. T tokens · H heads · L width · E experts per head."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels import gpu
from headway.kernels.gpu.arith import dot_close, dot_exact, dot_split, sigmoid, split
from headway.kernels.gpu.tune import Tiles, tiles

PROGRAMS = 1024
"""About as many programs share the sums over tokens: several waves on any GPU, few partial sums."""

KERNELS = ("route", "route_columns", "route_slots", "route_dx", "route_dw")
"""What is cut by tiles of its own. `route_columns` runs where `route` takes the experts in chunks,
`route_slots` reads scores where there is a gradient beside that of the gates."""


@triton.jit
def load_x(x, t, T, l0, L, stride_t, stride_l, BL: tl.constexpr):
    """Load a tile of tokens, columns l0 … l0 + BL − 1; 0 beyond the ends."""
    column = l0 + tl.arange(0, BL)
    at = t.to(tl.int64)[:, None] * stride_t + column[None, :] * stride_l
    return tl.load(x + at, mask=(t < T)[:, None] & (column < L)[None, :], other=0.0)


@triton.jit
def load_w(parts, part: tl.constexpr, h, e, H, E, l0, L, BL: tl.constexpr):
    """Load one of the three parts of some experts' rows `[BE, BL]`."""
    column = l0 + tl.arange(0, BL)
    at = ((part * H + h).to(tl.int64) * E + e)[:, None] * L + column[None, :]
    return tl.load(parts + at, mask=(e < E)[:, None] & (column < L)[None, :], other=0.0)


@triton.jit
def scores(
    x, parts, t, T, h, e, H, E, L, stride_t, stride_l,
    BL: tl.constexpr, ONCE: tl.constexpr, CLOSE: tl.constexpr = False,
):  # fmt: skip
    """Return logits `[BT, BE]`; 0 beyond the ends. ONCE: L fits one block. CLOSE: those of tokens
    in bfloat16 may be off by 2⁻¹⁷ of the products, enough for a gradient.

    Tensor cores add to an accumulator by truncation, so its error grows with the length of the
    chain: every block of columns has an accumulator of its own, and blocks are added in float32."""
    acc = tl.full((t.shape[0], e.shape[0]), 0.0, tl.float32)
    for l0 in range(0, 1 if ONCE else L, BL):
        xt = load_x(x, t, T, l0, L, stride_t, stride_l, BL)
        w0 = tl.trans(load_w(parts, 0, h, e, H, E, l0, L, BL))
        w1 = tl.trans(load_w(parts, 1, h, e, H, E, l0, L, BL))
        if CLOSE and xt.dtype == tl.bfloat16:
            acc += dot_close(xt, w0, w1)
        else:
            w2 = tl.trans(load_w(parts, 2, h, e, H, E, l0, L, BL))
            if xt.dtype == tl.bfloat16:
                acc += dot_exact(xt, w0, w1, w2)
            else:
                acc += dot_split(xt, w0, w1, w2)
    return acc


@triton.jit
def normalised(s, lse, total, SIGMOID: tl.constexpr):
    """Return the scores of a row normalised to sum 1, given its logsumexp and its sum of σ."""
    if SIGMOID:
        return sigmoid(s) / tl.where(total < 1e-20, 1e-20, total)[:, None]  # keeps NaN
    else:
        lse = tl.where(tl.abs(lse) == float("inf"), float("nan"), lse)  # as a softmax
        return tl.exp(s - lse[:, None])


@triton.jit
def split_into(w, parts, n, BLOCK: tl.constexpr):
    """Write the parts of n numbers as `[3, n]`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a0, a1, a2 = split(tl.load(w + i, mask=i < n, other=0.0))
    tl.store(parts + i, a0, mask=i < n)
    tl.store(parts + n + i, a1, mask=i < n)
    tl.store(parts + 2 * n + i, a2, mask=i < n)


def split_w(w_HEL: Tensor) -> Tensor:
    """Return the three bfloat16 parts `[3, H, E, L]` of the weights."""
    parts = w_HEL.new_empty(3, *w_HEL.shape, dtype=torch.bfloat16)
    n = w_HEL.numel()
    split_into[(triton.cdiv(n, 1024),)](w=w_HEL.contiguous(), parts=parts, n=n, BLOCK=1024)
    return parts


def strides(x: Tensor) -> dict[str, int]:
    """Return the strides of tokens, heads and columns; `[T, L]` is one token for all heads."""
    per_head = 0 if x.dim() == 2 else x.stride(1)
    return {"stride_t": x.stride(0), "stride_h": per_head, "stride_l": x.stride(-1)}


def width(L: int, most: int) -> int:
    """Return the columns of a tile for `L` of them: a power of two from 16 to `most`."""
    return min(max(triton.next_power_of_2(L), 16), most)


def walks(n_tiles: int, per_tile: int) -> tuple[int, int]:
    """Return (programs, tiles of each) for `n_tiles` tiles, each worked on by `per_tile`."""
    walk = triton.cdiv(n_tiles * per_tile, PROGRAMS)
    return triton.cdiv(n_tiles, walk), walk


def default_tiles(kernel: str, E: int) -> Tiles:
    """Return tiles that are the fastest, or nearly, on an H100 at 256 experts and L 64, 128 and
    256. `route` takes all experts as one chunk as long as the scores of a tile stay in registers.
    """
    match kernel:
        case "route":
            if E > 128:
                return Tiles(128, 64, 8, 2)
            return Tiles(64, 128, 8, 2) if E > 64 else Tiles(64, 64, 4, 2)
        case "route_slots":
            return Tiles(64, 64, 4, 2)
        case "route_columns":
            return Tiles(64, 32, 4, 3)
        case _:
            return Tiles(64, 32, 4, 3) if gpu.capability() >= 90 else Tiles(64, 32, 8, 2)


def fitting(kernel: str, x: Tensor, w_HEL: Tensor) -> Tiles:
    """Return the tiles of one of `KERNELS`; no more columns than there are experts."""
    _, E, L = w_HEL.shape
    best = tiles(kernel, (L, E, x.element_size()), default_tiles(kernel, E))
    return replace(best, cols=width(E, best.cols))


def launch(cut: Tiles) -> dict[str, int]:
    """Return the tiles as a kernel takes them."""
    return {"BT": cut.rows, "BE": cut.cols, "num_warps": cut.warps, "num_stages": cut.stages}
