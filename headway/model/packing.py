"""Pack the weights of a model for inference: each in the layout that its kernel reads, once."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Packs(Protocol):
    """A module that has a form of its weights for inference."""

    def pack(self, dtype: torch.dtype) -> None:
        """Pack the weights that this module or its children hold and are not packed yet, for
        products in `dtype`; leave their shapes behind (`shape_only`)."""
        ...


def pack_(model: nn.Module, dtype: torch.dtype) -> None:
    """Pack a model, or one layer, for inference with tokens in `dtype`.

    Call it once, when the weights are loaded and on their device (`load_model` of
    `checkpoint.runtime` and of `hub.load` do, after the last tensor). From then on the model has no
    gradients, is not saved and stays on its device. Modules pack one after another, parents first,
    so that no more than one of them exists twice; matrices may come in any dtype (give them `dtype`
    from the start and a second copy of the model never exists), routers, norms and biases become
    float32."""
    for module in model.modules():
        if isinstance(module, Packs):
            module.pack(dtype)


def shape_only(parameter: Tensor) -> nn.Parameter:
    """Return a parameter of the same shape and dtype without memory, for a module whose weight is
    packed: costs are counted on, whatever reads values fails."""
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
