"""Weights packed for inference, and products with them that depend on nothing but their own row.

T rows · H heads · K inputs · N outputs. `cpu/panels.h` has the layout: what the register tile
reads, in the order of memory, so that one row streams every weight once. Each output is a sum over
K in one float32 accumulator, in order, whatever the number of rows or threads: the same bits for a
row alone and among others. A bfloat16 weight for products in float32 is packed as it is and widened
on its way: half of the bytes for the same bits. Where there are no C++ kernels the same functions
run on an ordinary weight in PyTorch, whose sums depend on the number of rows; `batch_invariant`
says which."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.capture import capturing
from headway.kernels.cpp import cpp_kernels
from headway.kernels.precision import without_autocast

STORED = (torch.float32, torch.bfloat16)
"""Dtypes of weights that are packed without a copy, on any CPU."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[H, N, K]` without gradient, for products in `dtype`."""

    data: Tensor
    """int32 panels of `cpu/panels.h`, int16 for a bfloat16 weight of products in float32; the
    weight itself where no kernel reads those."""
    n_heads: int
    n_out: int
    n_in: int
    dtype: torch.dtype
    bias: Tensor | None
    """float32 `[H·N]` (float64 for float64)."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's result is the same bits whatever other rows there are."""
        return not self.data.is_floating_point()

    @property
    def narrow(self) -> bool:
        """Whether the weight is stored in half of the bytes of its products' dtype."""
        return self.data.dtype == torch.int16

    @property
    def n_bytes(self) -> int:
        """Return what a product reads of it."""
        return self.data.nbytes


def batch_invariant(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products on this device and in this dtype depend on nothing but their row."""
    return device.type == "cpu" and dtype in cpp_kernels().dtypes


def packs_narrow(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a bfloat16 weight stays one for products in `dtype`, a wider one."""
    return dtype is torch.float32 and batch_invariant(device, dtype)


def explain(device: torch.device, dtype: torch.dtype) -> str:
    """Return one line for people on which path products with packed weights take, and why."""
    if batch_invariant(device, dtype):
        return f"C++ kernels, batch-invariant: {cpp_kernels().why}"
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu":
        why = f"the packed kernels run on CPUs, not on {device.type}"
    elif cpp_kernels().library is None:
        why = cpp_kernels().why
    else:
        why = f"the C++ kernels do not take {name} here"
    return f"PyTorch, not batch-invariant: {why}"


def pack(weight_HNK: Tensor, dtype: torch.dtype, bias_HN: Tensor | None = None) -> PackedWeight:
    """Pack a weight `[N, K]` or, with one matrix per head, `[H, N, K]`, rounded to `dtype` once."""
    weight = weight_HNK.detach()
    weight = weight if weight.dim() == 3 else weight.unsqueeze(0)
    if bias_HN is not None:
        bias_HN = bias_HN.detach().flatten().to(torch.promote_types(dtype, torch.float32))
    (H, N, K), kernels = weight.shape, cpp_kernels()
    if not batch_invariant(weight.device, dtype):
        return PackedWeight(weight.to(dtype).contiguous(), H, N, K, dtype, bias_HN)
    if weight.dtype not in STORED:
        weight = weight.to(dtype)
    units, narrow = kernels.compute("packed_units", dtype, H, K, N), weight.dtype is torch.bfloat16
    if narrow and packs_narrow(weight.device, dtype):
        data = torch.empty(units, dtype=torch.int16)
        kernels.call("pack_narrow", dtype, weight.contiguous(), H, K, N, data)
    else:
        data = torch.empty(units, dtype=torch.int32)
        kernels.call("pack", dtype, weight.contiguous(), int(narrow), H, K, N, data)
    return PackedWeight(data, H, N, K, dtype, bias_HN)


def packed_linear_reference(x: Tensor, weight_HNK: Tensor, bias_HN: Tensor | None = None) -> Tensor:
    """Return what `packed_linear` does from the weight itself, by the definition."""
    if weight_HNK.dim() == 2:
        y = torch.einsum("...k,nk->...n", x, weight_HNK)
    else:
        y = torch.einsum("...hk,hnk->...hn", x, weight_HNK)
    return y if bias_HN is None else y + bias_HN


def packed_linear(x: Tensor, weight: PackedWeight, wide: bool = False) -> Tensor:
    """Return x·Wᵀ + bias without gradient: `[..., K]` → `[..., N]`, with heads `[..., H, K]` →
    `[..., H, N]`.

    Args:
        x: any float dtype; multiplied in the dtype of the weight.
        wide: return float32 (float64 for float64), not rounded, instead of x's dtype."""
    dtype, out_dtype = weight.dtype, x.dtype
    if x.dtype is not dtype:
        x = x.to(dtype)
    if wide:
        out_dtype = torch.promote_types(out_dtype, torch.float32)
    if not weight.batch_invariant:
        return _multiply(x, weight, wide).to(out_dtype)
    H, N, K = weight.n_heads, weight.n_out, weight.n_in
    rows = x.numel() // (H * K)
    if dtype is torch.bfloat16 and K % 2:
        x = F.pad(x, (0, 1))  # read in pairs
    out = torch.empty(*x.shape[:-1], N, dtype=torch.float32 if wide else dtype)
    arguments = (x.contiguous(), weight.data, weight.bias, rows, H, K, N, int(wide), out)
    cpp_kernels().call("narrow_linear" if weight.narrow else "packed_linear", dtype, *arguments)
    return out if out.dtype is out_dtype else out.to(out_dtype)


def packed_rows(weight: PackedWeight, index: Tensor) -> Tensor:
    """Return rows of a weight without heads (of a table of embeddings): int64 `[...]` →
    `[..., K]`.

    Raises: IndexError for one outside 0 … N − 1; in replays of a capture its row is NaN."""
    if not weight.batch_invariant:
        return F.embedding(index, weight.data[0])
    looks = index.numel() and not capturing()
    if looks and not 0 <= int(index.min()) <= int(index.max()) < weight.n_out:
        raise IndexError(f"an index lies outside 0 … {weight.n_out - 1}")
    out = torch.empty(*index.shape, weight.n_in, dtype=weight.dtype)
    sizes = (index.numel(), weight.n_in, weight.n_out)
    name = "unpack_narrow" if weight.narrow else "unpack"
    cpp_kernels().call(name, weight.dtype, weight.data, index.contiguous(), *sizes, out)
    return out


def _multiply(x: Tensor, weight: PackedWeight, wide: bool) -> Tensor:
    """Multiply in PyTorch; a wide result of narrow factors is not rounded in between."""
    matrix, bias = weight.data, weight.bias
    if wide:
        x, matrix = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, matrix))
    with without_autocast(x):
        if weight.n_heads == 1:
            return F.linear(x, matrix[0], None if bias is None else bias.to(x.dtype))
        x_HTK = x.flatten(0, -3).transpose(0, 1)
        y = torch.bmm(x_HTK, matrix.transpose(1, 2)).transpose(0, 1)
        y = y if bias is None else y + bias.view(weight.n_heads, -1).to(y.dtype)
        return y.reshape(*x.shape[:-1], weight.n_out)
