"""One optimiser step: the gradient of a batch, and the update that applies it."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headway.config import BalanceConfig, OptimConfig
from headway.data.batch import B
from headway.model.balance import RouteStats, add_stats, mean_stats, new_bias
from headway.model.transformer import Transformer
from headway.optim.groups import Optimizers, clip_factor
from headway.parallel.fsdp import set_gradient_sync
from headway.parallel.parallelize import SINGLE_PROCESS, Parallelism
from headway.parallel.placement import Sharding
from headway.parallel.reduce import global_stats, grad_norm, sum_over, summed_gradients
from headway.train.objective import Objective, StepContext


@dataclass(frozen=True)
class Gradient:
    """What a step measured, over all ranks; the gradients themselves are in the parameters."""

    loss_sum: float
    """`MicroLoss.loss_sum` of the whole batch; of `NextToken` in nats."""
    weight: float
    """`Objective.weight` of the whole batch; of `NextToken` its valid targets."""
    bytes: float
    """Bytes of text that the targets stand for; 0 where batches do not count them."""
    balance: float
    """Balance loss, mean over micro-batches."""
    norm: float
    """Global norm of the gradients, before clipping."""
    routes: list[RouteStats]
    """One per sparse layer, all heads: counts are summed over the batch, the rest averaged."""
    signals: int
    """Number of ranks that were asked to end."""
    sums: dict[str, float] = field(default_factory=dict)
    """`MicroLoss.sums` of the whole batch."""

    @property
    def loss(self) -> float:
        """The loss without balance; NaN for a batch without weight."""
        return self.loss_sum / self.weight if self.weight else math.nan

    @property
    def load(self) -> list[Tensor]:
        """Rows per expert `[H, E]` of each sparse layer, all heads: `load` of the next step."""
        return [route.counts_HE for route in self.routes]


def gradient(
    model: Transformer,
    micro_batches: Sequence[B],
    objective: Objective[B],
    parallelism: Parallelism = SINGLE_PROCESS,
    *,
    load: Sequence[Tensor] | None = None,
    signal: bool = False,
) -> Gradient:
    """Run backward through all micro-batches of a step; the gradient is that of the whole batch,
    however it is divided into micro-batches and among ranks.

    Args:
        micro_batches: this rank's rows; as many micro-batches, of one size, on every rank.
        load: `Gradient.load` of the last step that was applied, for the auxiliary loss of
            `global_batch`: that of this step is known only after its last forward pass. None
            before the first: even, which gives the auxiliary loss no gradient.
        signal: whether this rank was asked to end; `Gradient.signals` tells the others."""
    assert len({len(batch.tokens_BS) for batch in micro_batches}) == 1, "means weigh equal parts"
    device, sharding = model.device, parallelism.sharding
    mesh = sharding.mesh
    sizes = torch.zeros(3, dtype=torch.float64, device=device)
    sizes[2] = float(signal)
    for batch in micro_batches:
        sizes[0] += objective.weight(batch)
        if batch.bytes_B is not None:
            sizes[1] += batch.bytes_B.sum()
    sum_over(mesh.world, sizes, mesh, "targets")
    loads = _local_loads(model, load, sharding)
    n_parts = len(micro_batches) * mesh.size
    step = StepContext(sizes[0], n_parts, loads, parallelism.dispatcher)
    sums, names, routes = torch.zeros((), dtype=torch.float64, device=device), (), []
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        set_gradient_sync(model, last)
        loss = objective(model, batch, step)
        with summed_gradients(model, sharding) if last else nullcontext():
            loss.total.backward()
        reported, names = [loss.loss_sum, loss.balance, *loss.sums.values()], tuple(loss.sums)
        sums = sums + torch.stack([x.detach().to(sums) for x in reported])
        stats = [layer.detach() for layer in loss.stats]
        routes = add_stats(routes, stats) if routes else stats
    norm = grad_norm(model, sharding)
    means = [mean_stats(route, len(micro_batches)) for route in routes]
    merged, sums = global_stats(means, sums, sharding, model.config.moe.reads_token)
    # the one wait for the device in a step, but for the counts of an exchange over ep
    values = torch.cat([sizes, norm.double().unsqueeze(0), sums]).tolist()
    weight, text_bytes, signals, norm_value, loss_sum, balance_sum, *others = values
    return Gradient(
        loss_sum=loss_sum,
        weight=weight,
        bytes=text_bytes,
        balance=balance_sum / n_parts,
        norm=norm_value,
        routes=merged,
        signals=int(signals),
        sums=dict(zip(names, others, strict=True)),
    )


@torch.no_grad()
def update(
    model: Transformer,
    optimizers: Optimizers,
    result: Gradient,
    lr_factor: float,
    optim: OptimConfig,
    balance: BalanceConfig,
    parallelism: Parallelism = SINGLE_PROCESS,
) -> None:
    """Clip by the global norm, step the optimisers, then move the selection biases once."""
    optimizers.set_lr(lr_factor)
    optimizers.step(clip_factor(result.norm, optim.clip))
    if balance.bias != "none":
        for layer, stats in zip(model.sparse_layers(), result.routes, strict=True):
            bias_HE = layer.router.get_buffer("bias_HE")
            local = stats.map(lambda x, layer=layer: parallelism.sharding.local_heads(x, layer))
            bias_HE.copy_(new_bias(bias_HE, local, balance))


def _local_loads(
    model: Transformer, load: Sequence[Tensor] | None, sharding: Sharding
) -> list[Tensor]:
    """Return the rows per expert of the heads that are routed here, one tensor per sparse layer."""
    layers = model.sparse_layers()
    if load is None:
        return [torch.ones_like(layer.router.bias_HE) for layer in layers]
    return [
        sharding.local_heads(all_heads, layer).to(layer.router.bias_HE)
        for all_heads, layer in zip(load, layers, strict=True)
    ]
