"""Initialisation of every weight, by its role.

Every matrix preserves the variance of its input: entries ~ N(0, 1/fan_in), so activations stay near
RMS 1 behind an RMSNorm at any width. Exceptions, each with its reason:

| weight | rule | reason |
|---|---|---|
| norms | 1 | identity |
| last matrix of a branch | 1/fan_in, then / √(2·layers) | 2·layers branches add up to RMS 1 |
| embedding | N(0, init_std²) | small against the branches, which write RMS ~ 1/√(2·layers) each |
| output head | N(0, 1/D), then × 0.1 | first logits near 0, so the first loss is log V |
| biases | 0 | a layer starts without them |
| router noise | 0 | softplus(0) = 0.69 for every expert: noise starts uniform |
| buffers (selection bias) | 0 | no expert is preferred |

Each parameter is drawn from a generator of its own, keyed by the seed and its name: what two models
have in common (embedding, attention, head) starts equal with equal seeds, whatever else they hold.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headway.model.roles import roles_of


def init_weights(
    module: nn.Module, *, n_layers: int = 0, embed_std: float = 0.02, seed: int | None = None
) -> None:
    """Give all parameters and buffers of a model or of one layer the values of `initial_weights`;
    on the meta device only check that each has a role."""
    values = initial_weights(module, n_layers=n_layers, embed_std=embed_std, seed=seed)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if any(x.is_meta for x in tensors.values()):
        return
    with torch.no_grad():
        for name, value in values:
            tensors[name].copy_(value)


def initial_weights(
    module: nn.Module, *, n_layers: int = 0, embed_std: float = 0.02, seed: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and initial value, float32 on the CPU, of every parameter and buffer: drawn one
    at a time in the order of the module, so that no more than one of them need exist.

    Only roles and shapes of `module` are read, before this returns: it may be on the meta device,
    and be sharded before the values are drawn.

    Args:
        n_layers: residual depth; 0 (a layer on its own) leaves the last matrices of branches
        unscaled.
        seed: draw from generators keyed by it and the name, so that the same seed gives the same
        weights whatever ran before; None: from torch's own generator."""
    shapes = {name: x.shape for name, x in module.named_parameters()}
    shapes |= {name: x.shape for name, x in module.named_buffers()}
    rules = [
        (name, shapes[name], role.std(n_layers, embed_std))
        for name, role in roles_of(module).items()
    ]
    return ((name, _draw(shape, std, _generator(seed, name))) for name, shape, std in rules)


def _generator(seed: int | None, name: str) -> torch.Generator | None:
    if seed is None:
        return None
    key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))


def _draw(shape: torch.Size, std: float | None, generator: torch.Generator | None) -> Tensor:
    if std is None:
        return torch.ones(shape, device="cpu")
    if std == 0:
        return torch.zeros(shape, device="cpu")
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.mul_(std)
