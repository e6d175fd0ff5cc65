"""One optimiser step: the gradient of a batch, and what is done with it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.config import BalanceConfig, OptimConfig
from headway.data.stream import Batch
from headway.model.balance import RouteStats, balance_loss, merge_stats, new_bias
from headway.model.transformer import Transformer
from headway.train.optim import Optimizers, clip_factor, global_grad_norm


@dataclass(frozen=True)
class Gradient:
    """What a batch gave; the gradients themselves are in the parameters."""

    nats: float
    """Sum of −log p over the valid targets of the whole batch."""
    balance: float
    """Balance loss, mean over micro-batches."""
    norm: float
    """Global norm of the gradients, before clipping."""
    routes: list[RouteStats]
    """One per sparse layer: counts summed over the batch, the rest averaged."""


def gradient(
    model: Transformer, micros: list[Batch], valid_targets: int, balance: BalanceConfig
) -> Gradient:
    """Backward through all micro-batches of a step; the gradient is that of the whole batch.

    `valid_targets` counts those of the whole batch, so that each token weighs the same however it
    is split.
    """
    device = model.embed.weight.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    balance_sum = torch.zeros((), device=device)
    running: list[Tensor] = [torch.zeros((), device=device) for _ in model.sparse_layers()]
    routes: list[list[RouteStats]] = [[] for _ in running]
    for micro in micros:
        out = model(micro.tokens_BS, micro.targets_BS, micro.doc_BS)
        even = balance_loss(out.stats, balance, running)
        loss = out.nats / valid_targets + even / len(micros)
        loss.backward()
        nats += out.nats.detach()
        balance_sum += even.detach()
        for kept, stats in zip(routes, out.stats, strict=True):
            kept.append(merge_stats([stats]))
    norm = global_grad_norm(model.parameters())
    # The one wait for the device in a step.
    values = torch.stack([nats, balance_sum.double(), norm.double()]).tolist()
    merged = [merge_stats(parts) for parts in routes]
    return Gradient(values[0], values[1] / len(micros), values[2], merged)


@torch.no_grad()
def update(
    model: Transformer,
    optimizers: Optimizers,
    found: Gradient,
    lr_factor: float,
    optim: OptimConfig,
    balance: BalanceConfig,
) -> None:
    """Clips by the one global norm, steps the optimisers, then moves the selection biases once."""
    optimizers.set_lr(lr_factor)
    optimizers.step(clip_factor(found.norm, optim.clip))
    if balance.bias != "none":
        for layer, stats in zip(model.sparse_layers(), found.routes, strict=True):
            bias_HE = layer.router.get_buffer("bias_HE")
            bias_HE.copy_(new_bias(bias_HE, stats, balance))
