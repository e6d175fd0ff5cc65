"""Products, roundings and σ of tiles, also where Triton's interpreter has them wrong.

The interpreter multiplies bfloat16 tiles as 16-bit integers, rounds to bfloat16 by cutting off and
knows no e4m3. On a CPU these helpers therefore multiply in float32 (exact products, float32 sums,
as tensor cores do) and round to nearest even. On a GPU each is one instruction, or several where
float32 is kept:

A float32 number is the sum of three bfloat16 ones (8 bits of mantissa each). Products of parts are
exact in float32, so a·b with a in bfloat16 is three products, and with both in float32 six; the
three that are left out are 2⁻²⁴ of the result. Six products in bfloat16 cost what `tf32x3` costs,
and unlike it they are what the interpreter computes too."""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def widen(x):
    """Convert to float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 to `dtype` (bfloat16, or float32 itself), to nearest even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def narrow_float8(x):
    """Round float32 up to 448 to e4m3, to nearest even (interpreted: the values, in float32)."""
    if INTERPRETED:
        exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
        step = tl.exp2((tl.maximum(exponent, -6) - 3).to(tl.float32))
        magic = 12582912.0  # 1.5 · 2²³: what is added to it is rounded to an integer
        return ((x / step + magic) - magic) * step
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def encode_float8(x):
    """Round float32 up to 448 to the bytes of e4m3 (uint8), to nearest even.

    s eeee mmm    e > 0: ±2^(e − 7) · (1 + m/8);  e = 0: ±2^−6 · m/8;  e, m all ones: NaN"""
    if INTERPRETED:
        y = narrow_float8(x)
        bits = y.to(tl.int32, bitcast=True)
        exponent = ((bits >> 23) & 0xFF) - 127
        normal = ((exponent + 7) << 3) | ((bits >> 20) & 7)
        code = tl.where(exponent >= -6, normal, (tl.abs(y) * 512.0).to(tl.int32))
        code = tl.where(y == y, code, 0x7F)
        return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def split(a):
    """Split into (a0, a1, a2) in bfloat16, largest first; infinity and NaN are in a0 alone."""
    a0 = narrow(a, tl.bfloat16)
    rest = tl.where(tl.abs(a) < float("inf"), a - widen(a0), 0.0)
    a1 = narrow(rest, tl.bfloat16)
    return a0, a1, narrow(rest - widen(a1), tl.bfloat16)


@triton.jit
def dot(a, b, acc=None):
    """Return a·b (+ acc), summed in float32; float32 operands by three products of TF32 parts."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def dot_float8(a, b, SUM: tl.constexpr):
    """Return a·b of e4m3 over SUM products, promoted to float32 at least every 128 of them."""
    if INTERPRETED:
        return tl.dot(a, b.to(tl.float32))
    else:
        return tl.dot(a, b, max_num_imprecise_acc=SUM if SUM < 128 else 128)


@triton.jit
def dot_exact(a, b0, b1, b2):
    """Return a·(b0 + b1 + b2) for a in bfloat16; smallest parts first."""
    acc = dot(a, b2)
    acc = dot(a, b1, acc)
    return dot(a, b0, acc)


@triton.jit
def dot_close(a, b0, b1):
    """Return a·(b0 + b1) for a in bfloat16: off by 2⁻¹⁷ at most."""
    return dot(a, b0, dot(a, b1))


@triton.jit
def dot_split(a, b0, b1, b2):
    """Return a·(b0 + b1 + b2) for a in float32: six products of bfloat16 parts."""
    a0, a1, a2 = split(a)
    acc = dot(a2, b0)
    acc = dot(a1, b1, acc)
    acc = dot(a0, b2, acc)
    acc = dot(a1, b0, acc)
    acc = dot(a0, b1, acc)
    return dot(a0, b0, acc)


@triton.jit
def dot_rounded(a, b0, b1, acc):
    """Return acc + a·(b0 + b1) for a in float32, off by 2⁻¹⁶: enough for a bfloat16 result."""
    a0, a1, _ = split(a)
    acc = dot(a1, b0, acc)
    acc = dot(a0, b1, acc)
    return dot(a0, b0, acc)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
