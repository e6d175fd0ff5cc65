"""One optimiser step: the gradient of a batch, and what is done with it."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.config import BalanceConfig, OptimConfig
from headway.data.stream import Batch
from headway.model.balance import RouteStats, balance_loss, merge_stats, new_bias
from headway.model.transformer import Transformer
from headway.parallel.exchange import ALONE, Spread
from headway.parallel.fsdp import last_micro_batch
from headway.parallel.reduce import (
    global_stats,
    grad_norm,
    sum_over,
    summed_gradients,
    with_global_counts,
)
from headway.train.optim import Optimizers, clip_factor


@dataclass(frozen=True)
class Gradient:
    """What a batch gave, over all ranks; the gradients themselves are in the parameters."""

    nats: float
    """Sum of −log p over the valid targets of the whole batch."""
    targets: int
    """Valid targets of the whole batch."""
    bytes: float
    """Bytes of their text."""
    balance: float
    """Balance loss, mean over micro-batches."""
    norm: float
    """Global norm of the gradients, before clipping."""
    routes: list[RouteStats]
    """One per sparse layer, all heads: counts summed over the batch, the rest averaged."""
    signals: int
    """Ranks that were asked to end."""


def gradient(
    model: Transformer,
    micros: list[Batch],
    valid_targets: int,
    balance: BalanceConfig,
    spread: Spread = ALONE,
    *,
    n_bytes: float = 0.0,
    signal: bool = False,
) -> Gradient:
    """Backward through all micro-batches of a step; the gradient is that of the whole batch.

    Args:
        micros: of this rank's rows; as many, and as large, on every rank.
        valid_targets, n_bytes: in these rows. Each target weighs the same however the batch is
            split.
        spread: the ranks over which batch and model are spread.
        signal: this rank was asked to end; the others will know.
    """
    device, layout = model.embed.weight.device, spread.layout
    mesh, reads_token = layout.mesh, model.config.moe.router.reads == "token"
    own = (valid_targets, n_bytes, signal)
    sizes = torch.tensor(own, dtype=torch.float64, device=device)
    sum_over(mesh.world, sizes, mesh, "targets")
    nats = torch.zeros((), dtype=torch.float64, device=device)
    balance_sum = torch.zeros((), dtype=torch.float64, device=device)
    running: list[Tensor] = [torch.zeros((), device=device) for _ in model.sparse_layers()]
    routes: list[list[RouteStats]] = [[] for _ in running]
    for i, micro in enumerate(micros):
        last = i == len(micros) - 1
        last_micro_batch(model, last)
        out = model(micro.tokens_BS, micro.targets_BS, micro.doc_BS, spread.exchange)
        stats = out.stats
        if balance.aux and balance.aux_scope == "global_batch":
            stats = with_global_counts(stats, layout, reads_token)
        even = balance_loss(stats, balance, running)
        loss = out.nats / sizes[0].to(out.nats.dtype) + even / (len(micros) * mesh.size)
        with summed_gradients(model, layout) if last else nullcontext():
            loss.backward()
        nats += out.nats.detach()
        balance_sum += even.detach()
        for kept, found in zip(routes, out.stats, strict=True):
            kept.append(found.detach())
    norm = grad_norm(model, layout)
    sums = torch.stack([nats, balance_sum])
    merged, sums = global_stats([merge_stats(parts) for parts in routes], sums, layout, reads_token)
    # The one wait for the device in a step.
    values = torch.cat([sums, sizes, norm.double().unsqueeze(0)]).tolist()
    nats_sum, even_sum, targets, text_bytes, signals, norm_value = values
    return Gradient(
        nats=nats_sum,
        targets=int(targets),
        bytes=text_bytes,
        balance=even_sum / (len(micros) * mesh.size),
        norm=norm_value,
        routes=merged,
        signals=int(signals),
    )


@torch.no_grad()
def update(
    model: Transformer,
    optimizers: Optimizers,
    found: Gradient,
    lr_factor: float,
    optim: OptimConfig,
    balance: BalanceConfig,
    spread: Spread = ALONE,
) -> None:
    """Clips by the one global norm, steps the optimisers, then moves the selection biases once."""
    optimizers.set_lr(lr_factor)
    optimizers.step(clip_factor(found.norm, optim.clip))
    if balance.bias != "none":
        for layer, stats in zip(model.sparse_layers(), found.routes, strict=True):
            bias_HE = layer.router.get_buffer("bias_HE")
            mine = spread.layout.local_heads(stats, layer)
            bias_HE.copy_(new_bias(bias_HE, mine, balance))
