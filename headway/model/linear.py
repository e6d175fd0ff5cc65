"""Linear, norm and dense feed-forward layers that multiply in the dtype of their input and store in
float32."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.config import Activation, n_inputs
from headway.kernels.activation import activate
from headway.kernels.norm import rms_norm
from headway.kernels.packed import PackedWeight, pack, packed_linear, packed_rows, packs_narrow
from headway.kernels.precision import widen
from headway.model.context import Context
from headway.model.costs import Cost, CostGroup, Term, Workload, casts
from headway.model.packing import shape_only
from headway.model.roles import Group, Init, Role, StoresByRole


class Linear(StoresByRole):
    """y = x·Wᵀ (+ b), cast to the dtype of x. `ends_branch` and `head` are the weight's role."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        ends_branch: bool = False,
        head: bool = False,
    ):
        super().__init__()
        group, init = (Group.HEAD, Init.HEAD) if head else (Group.MATRIX, Init.FAN_IN)
        self._role = Role(group, init, d_in, ends_branch)
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.packed: PackedWeight | None = None

    def pack(self, dtype: torch.dtype) -> None:
        if not self.weight.is_meta:
            self.packed = pack_together([self], dtype)

    def roles(self) -> dict[str, Role]:
        return {"weight": self._role, "bias": Role(Group.VECTOR, Init.ZEROS)}

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return packed_linear(x, self.packed)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def pack_together(layers: Sequence[Linear], dtype: torch.dtype) -> PackedWeight:
    """Pack layers that read the same input as one product; its outputs follow one another."""
    weight = layers[0].weight
    if len(layers) > 1:
        weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None
    if any(layer.bias is not None for layer in layers):
        zeros = [weight.new_zeros(len(layer.weight)) for layer in layers]
        pairs = zip(layers, zeros, strict=True)
        bias = torch.cat([zero if x.bias is None else x.bias.detach() for x, zero in pairs])
    for layer in layers:
        layer.weight = shape_only(layer.weight)
        layer.bias = None if layer.bias is None else shape_only(layer.bias)
    return pack(weight, dtype, bias)


class Embedding(nn.Embedding):
    """A table `[V, D]` of token embeddings."""

    def __init__(self, n_rows: int, width: int):
        super().__init__(n_rows, width)
        self.packed: PackedWeight | None = None

    def roles(self) -> dict[str, Role]:
        return {"weight": Role(Group.EMBEDDING, Init.EMBEDDING)}

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is not None:
            return packed_rows(self.packed, input)
        return super().forward(input)

    def pack(self, dtype: torch.dtype) -> None:
        """Keep the table as it is, in `dtype` or as a narrower one: single rows are read."""
        if not self.weight.is_meta:
            weight = self.weight.detach()
            if not (weight.dtype is torch.bfloat16 and packs_narrow(weight.device, dtype)):
                weight = weight.to(dtype)
            self.weight = nn.Parameter(weight, requires_grad=False)

    def pack_as_head(self, dtype: torch.dtype) -> None:
        """Pack the table as the matrix of a tied output head; rows are read out of it."""
        self.packed = pack(self.weight, dtype)
        self.weight = shape_only(self.weight)


class RMSNorm(StoresByRole):
    """Learnable RMSNorm over the last dim; `shape` is `(D,)`, or `(H, L)` for one weight row per
    head."""

    def __init__(self, *shape: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps = eps

    def roles(self) -> dict[str, Role]:
        return {"weight": Role(Group.VECTOR, Init.ONES)}

    def pack(self, dtype: torch.dtype) -> None:
        self.weight = nn.Parameter(widen(self.weight.detach()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """Dense feed-forward network, D → F → D, also the shared expert. `w_in` holds gate and up for
    SwiGLU."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation):
        super().__init__()
        self.activation: Activation = activation
        self.w_in = Linear(d_model, n_inputs(activation) * d_ff)
        self.w_out = Linear(d_ff, d_model, ends_branch=True)

    def forward(self, x: Tensor, ctx: Context | None = None) -> tuple[Tensor, None]:
        """Map `[..., D]` to `[..., D]`; a dense network has no routing statistics."""
        return self.w_out(activate(self.w_in(x), self.activation)), None

    def costs(self, work: Workload, group: CostGroup = CostGroup.DENSE) -> Sequence[Cost]:
        """Saved are what the activation reads and what it gives."""
        D, F = self.w_out.weight.shape
        weights = (n_inputs(self.activation) + 1) * D * F
        terms = n_inputs(self.activation) + 1
        letter = "F" if group is CostGroup.DENSE else "F_shared"
        saved = work.n_tokens * work.bytes_per_value * terms * F
        cost = Cost(
            group,
            Term(weights, f"(G+1)·D·{letter}"),
            Term(2 * weights, f"2·(G+1)·D·{letter}"),
            Term(saved, f"{terms}·T·b·{letter}"),
        )
        return (cost, casts(weights, work))
