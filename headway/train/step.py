"""One optimiser step: the gradient of a batch, and what is done with it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.config import BalanceConfig, OptimConfig
from headway.data.batch import Batch
from headway.model.balance import RouteStats, add_stats, balance_loss, mean_stats, new_bias
from headway.model.transformer import Transformer
from headway.optim.groups import Optimizers, clip_factor
from headway.parallel.fsdp import set_gradient_sync
from headway.parallel.parallelize import SINGLE_PROCESS, Parallelism
from headway.parallel.placement import Sharding
from headway.parallel.reduce import (
    global_stats,
    grad_norm,
    sum_over,
    summed_gradients,
)


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

    @property
    def load(self) -> list[Tensor]:
        """Rows per expert `[H, E]`, one per sparse layer, all heads: what the auxiliary loss of the
        next step reads."""
        return [route.counts_HE for route in self.routes]


def gradient(
    model: Transformer,
    micros: list[Batch],
    valid_targets: int,
    balance: BalanceConfig,
    parallelism: Parallelism = SINGLE_PROCESS,
    *,
    load: Sequence[Tensor] | None = None,
    n_bytes: float = 0.0,
    signal: bool = False,
) -> Gradient:
    """Backward through all micro-batches of a step; the gradient is that of the whole batch,
    however it is cut into micro-batches and spread over ranks.

    Args:
        micros: of this rank's rows, all of one size; as many, and as large, on every rank.
        valid_targets, n_bytes: in these rows. Each target weighs the same however the batch is
            split.
        spread: the ranks over which batch and model are spread.
        load: `Gradient.load` of the last step that was applied, for the auxiliary loss of
            `global_batch`: that of this step is known only after its last forward pass. None
            before the first: even, which gives the auxiliary loss no gradient.
        signal: this rank was asked to end; the others will know.
    """
    assert len({len(micro.tokens_BS) for micro in micros}) == 1, "means weigh parts of one size"
    device, sharding = model.embed.weight.device, parallelism.sharding
    mesh, reads_token = sharding.mesh, model.config.moe.reads_token
    own = (valid_targets, n_bytes, signal)
    sizes = torch.tensor(own, dtype=torch.float64, device=device)
    sum_over(mesh.world, sizes, mesh, "targets")
    nats = torch.zeros((), dtype=torch.float64, device=device)
    balance_sum = torch.zeros((), dtype=torch.float64, device=device)
    loads = _local_loads(model, load, sharding)
    routes: list[RouteStats] = []
    for i, micro in enumerate(micros):
        last = i == len(micros) - 1
        set_gradient_sync(model, last)
        out = model(micro.tokens_BS, micro.targets_BS, micro.doc_BS, parallelism.dispatcher)
        even = balance_loss(out.stats, balance, loads)
        loss = out.nats / sizes[0].to(out.nats.dtype) + even / (len(micros) * mesh.size)
        with summed_gradients(model, sharding) if last else nullcontext():
            loss.backward()
        nats += out.nats.detach()
        balance_sum += even.detach()
        new = [stats.detach() for stats in out.stats]
        routes = [add_stats(a, b) for a, b in zip(routes, new, strict=True)] if routes else new
    norm = grad_norm(model, sharding)
    sums = torch.stack([nats, balance_sum])
    means = [mean_stats(route, len(micros)) for route in routes]
    merged, sums = global_stats(means, sums, sharding, reads_token)
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
    parallelism: Parallelism = SINGLE_PROCESS,
) -> None:
    """Clips by the one global norm, steps the optimisers, then moves the selection biases once."""
    optimizers.set_lr(lr_factor)
    optimizers.step(clip_factor(found.norm, optim.clip))
    if balance.bias != "none":
        for layer, stats in zip(model.sparse_layers(), found.routes, strict=True):
            bias_HE = layer.router.get_buffer("bias_HE")
            mine = stats.map(lambda x, layer=layer: parallelism.sharding.local_heads(x, layer))
            bias_HE.copy_(new_bias(bias_HE, mine, balance))


def _local_loads(
    model: Transformer, load: Sequence[Tensor] | None, sharding: Sharding
) -> list[Tensor]:
    """Rows per expert of the heads that are routed here, one tensor per sparse layer."""
    layers = model.sparse_layers()
    even = [torch.ones_like(layer.router.bias_HE) for layer in layers]
    if load is None:
        return even
    return [
        sharding.local_heads(whole, layer).to(like)
        for whole, layer, like in zip(load, layers, even, strict=True)
    ]
