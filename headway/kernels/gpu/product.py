"""Products of float32 matrices on bfloat16 tensor cores, near float32.

A float32 number is the sum of three bfloat16 ones (8 bits of mantissa each). Products of parts are
exact in float32, so a·b with a in bfloat16 is three products, and with both in float32 six; the
three that are left out are 2⁻²⁴ of the result. Six products in bfloat16 cost what `tf32x3` costs,
and unlike it they are what the interpreter computes too.
"""

# Triton's annotations describe its compiler, not what a kernel writes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def split(a):
    """(a0, a1, a2) in bfloat16, largest first. Infinity and NaN stay whole in a0."""
    a0 = a.to(tl.bfloat16)
    finite = tl.abs(a) < float("inf")
    rest = tl.where(finite, a - a0.to(tl.float32), 0.0)
    a1 = rest.to(tl.bfloat16)
    a2 = (rest - a1.to(tl.float32)).to(tl.bfloat16)
    return a0, a1, a2


@triton.jit
def dot(a, b, acc):
    """acc + a·b of bfloat16 tiles. The interpreter multiplies the bits of a bfloat16 as an integer;
    as float32 the products are the same."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def dot_exact(a, b0, b1, b2, acc):
    """acc + a·(b0 + b1 + b2), a in bfloat16; smallest first."""
    acc = dot(a, b2, acc)
    acc = dot(a, b1, acc)
    return dot(a, b0, acc)


@triton.jit
def dot_split(a, b0, b1, b2, acc):
    """The same with a in float32."""
    a0, a1, a2 = split(a)
    acc = dot(a2, b0, acc)
    acc = dot(a1, b1, acc)
    acc = dot(a0, b2, acc)
    acc = dot(a1, b0, acc)
    acc = dot(a0, b1, acc)
    return dot(a0, b0, acc)


@triton.jit
def dot_rounded(a, b0, b1, acc):
    """The same to 2⁻¹⁶, enough where the result is rounded to bfloat16."""
    a0 = a.to(tl.bfloat16)
    a1 = tl.where(tl.abs(a) < float("inf"), a - a0.to(tl.float32), 0.0).to(tl.bfloat16)
    acc = dot(a1, b0, acc)
    acc = dot(a0, b1, acc)
    return dot(a0, b0, acc)


@triton.jit
def split_into(w, parts, n, BLOCK: tl.constexpr):
    """Writes the parts of n numbers as `[3, n]`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a0, a1, a2 = split(tl.load(w + i, mask=i < n, other=0.0))
    tl.store(parts + i, a0, mask=i < n)
    tl.store(parts + n + i, a1, mask=i < n)
    tl.store(parts + 2 * n + i, a2, mask=i < n)
