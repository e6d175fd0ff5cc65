"""Initialisation of every weight, in one place.

Every matrix preserves the variance of its input: entries ~ N(0, 1/fan_in), so activations stay near
RMS 1 behind an RMSNorm at any width. Exceptions, each with its reason:

| weight | rule | reason |
|---|---|---|
| norms | 1 | identity |
| last matrix of a branch | 1/fan_in, then / √(2·layers) | 2·layers branches add up to RMS 1 |
| embedding | N(0, init_std²) | small against the branches, which write RMS ~ 1/√(2·layers) each |
| output head | N(0, 1/D), then × 0.1 | first logits near 0, so the first loss is log V |
| router noise | 0 | softplus(0) = 0.69 for every expert: noise starts uniform |
| buffers (selection bias) | 0 | no expert is preferred |
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def init_weights(
    module: nn.Module, *, n_layers: int = 0, embed_std: float = 0.02, seed: int | None = None
) -> None:
    """Gives all parameters and buffers of a model or of one layer the values of `initial_weights`;
    does nothing on the meta device."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if any(x.is_meta for x in tensors.values()):
        return
    with torch.no_grad():
        found = initial_weights(module, n_layers=n_layers, embed_std=embed_std, seed=seed)
        for name, value in found:
            tensors[name].copy_(value)


def initial_weights(
    module: nn.Module, *, n_layers: int = 0, embed_std: float = 0.02, seed: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and initial value, float32 on the CPU, of every parameter and buffer: drawn one at a
    time in the order of the module, so that no more than one of them need exist.

    Only the shapes of `module` are read, before this returns: it may lie on the meta device, and be
    cut before the values are drawn.

    Args:
        n_layers: residual depth; 0 (a layer on its own) leaves the last matrices of branches
        unscaled.
        seed: draw from a generator of its own, so that the same seed gives the same weights
        whatever ran before.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    parameters = dict(module.named_parameters())
    depth = 1 / math.sqrt(2 * n_layers) if n_layers else 1.0
    rules: list[tuple[str, torch.Size, float | None]] = [
        (name, p.shape, _std(name, p, parameters, depth, embed_std))
        for name, p in parameters.items()
    ]
    rules += [(name, buffer.shape, 0.0) for name, buffer in module.named_buffers()]
    return ((name, _draw(shape, std, generator)) for name, shape, std in rules)


def _draw(shape: torch.Size, std: float | None, generator: torch.Generator | None) -> Tensor:
    if std is None:
        return torch.ones(shape, device="cpu")
    if std == 0:
        return torch.zeros(shape, device="cpu")
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.mul_(std)


def _std(
    name: str, p: nn.Parameter, parameters: dict[str, nn.Parameter], depth: float, embed_std: float
) -> float | None:
    """Standard deviation of a weight; None for norms, which start at 1."""
    owner, _, leaf = name.rpartition(".")
    part = owner.rpartition(".")[2]
    if "norm" in part:
        return None
    if part == "embed":
        return embed_std
    if part == "head":
        return 0.1 / math.sqrt(p.shape[-1])
    if leaf == "w_noise_HEL":
        return 0.0
    if leaf == "w_out_HEFL":
        # in a latent layer W_out follows and carries the depth scale
        layer = owner.rpartition(".")[0]
        merged = f"{layer}.w_out.weight".lstrip(".") in parameters
        return (1.0 if merged else depth) / math.sqrt(p.shape[-2])
    last_of_branch = part in ("o", "w_out")
    return (depth if last_of_branch else 1.0) / math.sqrt(p.shape[-1])
