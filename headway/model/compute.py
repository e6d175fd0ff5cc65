"""How a model computes, beside what it is."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Compute:
    """The dtype of the matmuls, and what is kept for backward. (The precision of the experts'
    products is `MoEConfig.precision`.)"""

    dtype: torch.dtype = torch.float32
    """Of the matmuls and the residual stream; parameters are float32."""
    recompute: bool = False
    """Constant-memory sparse layers: nothing of size rows × F or T × E is kept for backward."""
