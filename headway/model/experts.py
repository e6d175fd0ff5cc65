"""Stacked experts: the weights of all heads and experts of a layer in two parameters.

H heads · E experts per head · F hidden width · L width · G = 2 for SwiGLU (gate, then up), else 1.
Expert (h, e) is `w_in_HEGFL[h, e]` and `w_out_HEFL[h, e]`: its global name, whatever the mesh.
"""

import torch
from torch import Tensor, nn

from headway.config import Activation, Precision, n_inputs
from headway.kernels.experts import experts
from headway.kernels.permute import sort_rows
from headway.model.router import Route


class Experts(nn.Module):
    """y = Σ_k gate_k · w_out[e_k]ᵀ act(w_in[e_k]·x), no biases."""

    def __init__(
        self,
        n_heads: int,
        n_experts: int,
        d_in: int,
        d_expert: int,
        activation: Activation,
        recompute: bool = False,
        precision: Precision = "bfloat16",
    ):
        super().__init__()
        self.activation: Activation = activation
        self.precision: Precision = precision
        self.recompute = recompute
        n_in = n_inputs(activation)
        self.w_in_HEGFL = nn.Parameter(torch.empty(n_heads, n_experts, n_in, d_expert, d_in))
        self.w_out_HEFL = nn.Parameter(torch.empty(n_heads, n_experts, d_expert, d_in))

    def forward(self, x_THL: Tensor, route: Route) -> Tensor:
        """`[T, H, L]` → `[T, H, L]` in x's dtype.

        Or `[T, 1, L]` where each sub-token has a head of its own (Expert Parallel): the indices
        then count all H·E experts, expert e of head h being h·E + e.
        """
        H = x_THL.shape[1]
        w_in, w_out = (w.view(H, -1, *w.shape[2:]) for w in (self.w_in_HEGFL, self.w_out_HEFL))
        y_NL = experts(
            x_THL.flatten(0, 1),
            route.gate_THK.flatten(0, 1),
            sort_rows(route.index_THK, w_in.shape[1]),
            w_in,
            w_out,
            self.activation,
            self.recompute,
            self.precision,
        )
        return y_NL.view(x_THL.shape)
