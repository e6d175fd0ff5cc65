"""The costs of a model, counted once on the meta device for all meshes.

Parameters, FLOPs and saved bytes are what the modules declare (`model.costs`); how a parameter is
updated and sharded follows from its role (`model.roles`)."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch

from headway.config import Config, ModelConfig
from headway.model import costs as c
from headway.model.build import BlockBuilder, build_block
from headway.model.compute import Compute
from headway.model.costs import CostGroup, Workload
from headway.model.roles import Group, SplitOver, roles_of
from headway.model.transformer import Transformer


class Item(NamedTuple):
    """One line of a sum: what it is for, its value, and the formula that gave it."""

    part: Enum
    """The value of this member is the label."""
    value: float
    formula: str

    @property
    def name(self) -> str:
        """The label."""
        return self.part.value


Items = tuple[Item, ...]


def total(items: Iterable[Item]) -> float:
    """Return the sum of the values."""
    return sum(item.value for item in items)


@dataclass
class Weights:
    """All parameters of a model that are updated and sharded alike."""

    group: Group
    shard: SplitOver
    count: int = 0
    matrices: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(smaller, larger dim) → number of such matrices in stacks and on their own."""


@dataclass(frozen=True)
class ModelCosts:
    """What a model costs in a forward pass of one process."""

    config: ModelConfig
    weights: tuple[Weights, ...]
    parameters: Items
    active: Items
    """Parameters that one token visits."""
    flops: Items
    """FLOPs of the forward pass per token."""
    saved: Items
    """Bytes kept for backward."""

    @classmethod
    def of(cls, model: Transformer, work: Workload) -> "ModelCosts":
        """Count a model, on the meta device or not. Raises UsageError for a module without costs
        or a parameter without a role."""
        costs = c.costs_of(model, work)
        sums = (
            tuple(Item(group, *term) for group, term in c.by_group(costs, quantity).items())
            for quantity in (c.parameters, c.active_parameters, c.flops, c.saved_bytes)
        )
        return cls(model.config, _weights(model), *sums)

    def flops_of(self, group: CostGroup) -> float:
        """Return the FLOPs of one group per token; 0 where the model has none of it."""
        return sum(item.value for item in self.flops if item.part is group)

    @property
    def training_flops(self) -> float:
        """FLOPs of forward and backward per token: 3 × forward. What `recompute` computes again is
        not counted as work."""
        return 3 * total(self.flops)


def model_costs(
    config: Config,
    batch: int,
    bytes_per_value: int = 4,
    blocks: BlockBuilder = build_block,
    dense_masks: bool = False,
    edit: Callable[[Transformer], None] | None = None,
) -> ModelCosts:
    """Return the costs of a config whose vocabulary is resolved, with `batch` sequences in a
    forward pass. `blocks` builds blocks with modules of your own, as in `Transformer`;
    `dense_masks` is that of `Workload`; `edit` changes the model, as in `train.loop.train`."""
    data = config.data
    work = Workload(data.seq_len, batch, bytes_per_value, data.doc_mask, dense_masks)
    with torch.device("meta"):
        model = Transformer(config.model, Compute(recompute=config.run.recompute), blocks=blocks)
        if edit is not None:
            with torch.no_grad():
                edit(model)
    return ModelCosts.of(model, work)


def _weights(model: Transformer) -> tuple[Weights, ...]:
    roles, by_key = roles_of(model), dict[tuple[Group, SplitOver], Weights]()
    for name, p in model.named_parameters():
        role = roles[name]
        weights = by_key.setdefault((role.group, role.shard), Weights(role.group, role.shard))
        weights.count += p.numel()
        if p.dim() >= 2:
            m, n = sorted(p.shape[-2:])
            weights.matrices[m, n] += math.prod(p.shape[:-2])
    return tuple(by_key.values())
