"""What hand-written backward passes cannot: a second derivative, forward mode, `torch.func`.

There each operator runs as its reference in PyTorch's own operators, which has all of them.
`headway doctor` says so."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Return whether a transform of `torch.func` (grad, vmap, jvp, …) or forward-mode AD is at
    work. A custom operator would raise, loop over the samples, or lose the tangent without a word.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def reference_grads(
    reference: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    d_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `reference(*inputs)` as a function that can be differentiated again.

    For a backward pass that runs with gradients on, as it does under `create_graph=True`.

    Args:
        needed: which inputs want a gradient, as `ctx.needs_input_grad`; the others get None.
        d_outputs: one for each output; None is 0."""
    leaves = [x.view_as(x) if wanted else x for x, wanted in zip(inputs, needed, strict=True)]
    outputs = reference(*leaves)
    given = [(y, dy) for y, dy in zip(outputs, d_outputs, strict=True) if dy is not None]
    sought = [x for x, wanted in zip(leaves, needed, strict=True) if wanted]
    ys, dys = [y for y, _ in given], [dy for _, dy in given]
    grads = iter(torch.autograd.grad(ys, sought, dys, create_graph=True, allow_unused=True))
    return tuple(next(grads) if wanted else None for wanted in needed)
