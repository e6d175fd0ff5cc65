"""Experts with weights packed for inference, in C++: see `experts.py` for the equations and the
reference, `packed.py` for what a packed product promises, `cpu/packed_experts.cpp` for the layout.

T tokens · H heads · N = T·H sub-tokens · L width · E experts per head · F hidden width · G
pre-activations per hidden unit · K slots."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.config import Activation
from headway.kernels.activation import ACTIVATIONS
from headway.kernels.cpp import cpp_kernels
from headway.kernels.packed import STORED, batch_invariant, packs_narrow


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The weights of all experts of a layer without gradient, for products in `dtype`."""

    data: Tensor
    """int32 `[H·E, units of an expert]`; int16 of bfloat16 weights for products in float32."""
    shape: tuple[int, int, int, int, int]
    """H, E, G, F, L."""
    dtype: torch.dtype
    activation: Activation

    @property
    def expert_bytes(self) -> int:
        """Return what a pass reads of an expert that has rows."""
        return self.data[0].nbytes


def pack_experts(
    w_in_HEGFL: Tensor, w_out_HEFL: Tensor, activation: Activation, dtype: torch.dtype
) -> PackedExperts:
    """Pack the weights of a layer's experts, rounded to `dtype` once, where products are
    `batch_invariant`."""
    w_in, w_out, kernels = w_in_HEGFL.detach(), w_out_HEFL.detach(), cpp_kernels()
    assert batch_invariant(w_in.device, dtype)
    if w_in.dtype is not w_out.dtype or w_in.dtype not in STORED:
        w_in, w_out = w_in.to(dtype), w_out.to(dtype)  # the narrower would round the other one
    H, E, G, F, L = w_in.shape
    units = kernels.compute("packed_expert_units", dtype, L, F, G)
    stored = (w_in.contiguous(), w_out.contiguous())
    narrow = w_in.dtype is torch.bfloat16
    if narrow and packs_narrow(w_in.device, dtype):
        data = torch.empty(H * E, units, dtype=torch.int16)
        kernels.call("pack_narrow_experts", dtype, *stored, H * E, L, F, G, data)
    else:
        data = torch.empty(H * E, units, dtype=torch.int32)
        kernels.call("pack_experts", dtype, *stored, int(narrow), H * E, L, F, G, data)
    return PackedExperts(data, (H, E, G, F, L), dtype, activation)


def packed_experts(
    x_THL: Tensor, gate_THK: Tensor, index_THK: Tensor, weights: PackedExperts
) -> Tensor:
    """Return Σ_k gate · expert(x) of every sub-token, slots in their order, without gradient.

    Args:
        x_THL: `[T, H, L]`, any float dtype; multiplied in that of the weights.
        gate_THK: float32 `[T, H, K]`.
        index_THK: integer `[T, H, K]` in 0 … E − 1; E and above takes no expert. With one head here
        and several in the weights, each sub-token is a token: indices count all H·E experts.
    Returns: `[T, H, L]` in x's dtype."""
    H, E, G, F, L = weights.shape
    T, heads, K = index_THK.shape
    x = x_THL.to(weights.dtype).contiguous()
    out, y = torch.empty_like(x), x.new_empty(T * heads * K, L, dtype=torch.float32)
    tensors = (x, gate_THK.float().contiguous(), index_THK.long().contiguous(), weights.data)
    sizes = (T, heads, K, H * E // heads, L, F, G, ACTIVATIONS.index(weights.activation))
    name = "narrow_experts" if weights.data.dtype is torch.int16 else "packed_experts"
    cpp_kernels().call(name, weights.dtype, *tensors, *sizes, y, out)
    return out.to(x_THL.dtype)
