"""Initialisation of every weight, in one function.

Every matrix preserves the variance of its input: entries ~ N(0, 1/fan_in), so activations stay near
RMS 1 behind an RMSNorm at any width. Exceptions, each with its reason:

| weight | rule | reason |
|---|---|---|
| norms | 1 | identity |
| last matrix of a branch | 1/fan_in, then / √(2·layers) | 2·layers branches add up to RMS 1 |
| embedding | N(0, init_std²) | small against the branches, which write RMS ~ 1/√(2·layers) each |
| output head | N(0, 1/D), then × 0.1 | first logits near 0, so the first loss is log V |
| router noise | 0 | softplus(0) = 0.69 for every expert: noise starts uniform |
"""

import math

import torch
from torch import nn


def init_weights(
    module: nn.Module, *, n_layers: int = 0, embed_std: float = 0.02, seed: int | None = None
) -> None:
    """Initialise all parameters of a model or of one layer, in the order of their names.

    Args:
        n_layers: residual depth; 0 (a layer on its own) leaves the last matrices of branches
        unscaled.
        seed: draw from a generator of its own, so that the same seed gives the same weights
        whatever ran before.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    parameters = dict(module.named_parameters())
    depth = 1 / math.sqrt(2 * n_layers) if n_layers else 1.0
    with torch.no_grad():
        for name, p in parameters.items():
            if p.is_meta:  # nothing to initialise: a dry run
                continue
            std = _std(name, p, parameters, depth, embed_std)
            if std is None:
                p.fill_(1.0)
            elif std == 0:
                p.zero_()
            else:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32) * std)


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
