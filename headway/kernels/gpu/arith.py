"""Products and roundings of the kernels, also where Triton's interpreter has them wrong.

The interpreter multiplies bfloat16 tiles as 16-bit integers and rounds to bfloat16 by cutting off.
On a CPU these helpers therefore multiply in float32 (exact products, float32 sums, as tensor cores
do) and round to nearest even on the bits. On a GPU they are one instruction each.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def widen(x):
    """To float32, exact."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to `dtype` (bfloat16, or float32 itself), nearest even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc=None):
    """a·b (+ acc) with a float32 sum; float32 operands keep their precision (three products of
    TF32 parts)."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc)
    return tl.dot(a, b, acc, input_precision="tf32x3")
