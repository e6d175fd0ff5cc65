"""Linear, norm and dense feed-forward layers that multiply in the dtype of their input and store in
float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.config import Activation, n_inputs
from headway.kernels.activation import activate
from headway.kernels.norm import rms_norm


class Linear(nn.Module):
    """y = x·Wᵀ, no bias; the weight is cast to the dtype of x."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Learnable RMSNorm over the last dim; `shape` is `(D,)`, or `(H, L)` for one weight row per
    head.
    """

    def __init__(self, *shape: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """Dense feed-forward network, D → F → D, also the shared expert. `w_in` holds gate and up for
    SwiGLU.
    """

    def __init__(self, d_model: int, d_ff: int, activation: Activation):
        super().__init__()
        self.activation: Activation = activation
        self.w_in = Linear(d_model, n_inputs(activation) * d_ff)
        self.w_out = Linear(d_ff, d_model)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w_out(activate(self.w_in(x_TD), self.activation))
