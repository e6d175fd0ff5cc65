"""Objectives: what a training step minimises, and the one of pre-training.

`step.gradient` knows micro-batches, ranks and the backward pass; an objective knows the loss of one
micro-batch. An objective may keep what it needs beside the model, such as a frozen teacher, and
read what a subclass of `Batch` adds per row, such as token weights or advantages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from headway.config import BalanceConfig
from headway.data.batch import Batch
from headway.model.balance import RouteStats, balance_loss
from headway.model.context import Context
from headway.model.dispatch import TokenDispatcher
from headway.model.transformer import Transformer

B_contra = TypeVar("B_contra", bound=Batch, contravariant=True)


@dataclass(frozen=True)
class StepContext:
    """What all micro-batches of a step share, on all ranks."""

    weight: Tensor
    """float64 scalar, Σ of `Objective.weight` over all micro-batches of all ranks."""
    n_micro_batches: int
    """Number of micro-batches on all ranks together."""
    load: Sequence[Tensor]
    """Rows per expert `[H, E]`, one per sparse layer, which the auxiliary loss reads."""
    dispatcher: TokenDispatcher


class MicroLoss(NamedTuple):
    """The loss of one micro-batch. The step differentiates `total` and reports the rest."""

    total: Tensor
    """Scalar with gradient. Its sum over all micro-batches and ranks is the loss of the step."""
    loss_sum: Tensor
    """Scalar, the sum that is reported over the step's weight: without balance, undivided."""
    balance: Tensor
    """Scalar, the balance loss; its mean over micro-batches is reported."""
    stats: tuple[RouteStats, ...]
    """One per sparse layer, first layer first."""
    sums: Mapping[str, Tensor] = {}
    """Further scalars, each in every micro-batch, reported as sums over micro-batches and ranks."""


class Objective(Protocol[B_contra]):
    """The loss of a micro-batch. Gradients are sums over micro-batches and ranks, and nothing is
    divided afterwards, so `total` must be divided by `step.weight`, the weight of the whole batch.
    """

    def weight(self, batch: B_contra) -> Tensor:
        """Return what this micro-batch adds to the weight of the step: a scalar of any dtype."""
        ...

    def __call__(self, model: Transformer, batch: B_contra, step: StepContext) -> MicroLoss:
        """Run the model on a micro-batch and return its part of the step's loss."""
        ...


@dataclass(frozen=True)
class NextToken:
    """−log p of the next token, averaged over the valid targets of the whole batch, and the balance
    loss, averaged over micro-batches."""

    balance: BalanceConfig

    def weight(self, batch: Batch) -> Tensor:
        """Return the number of valid targets, int64."""
        return (batch.targets_BS >= 0).sum()

    def __call__(self, model: Transformer, batch: Batch, step: StepContext) -> MicroLoss:
        ctx = Context(batch.doc_BS, dispatcher=step.dispatcher)
        out = model(batch.tokens_BS, batch.targets_BS, ctx)
        aux = balance_loss(out.stats, self.balance, step.load)
        total = out.nats / step.weight.to(out.nats.dtype) + aux / step.n_micro_batches
        return MicroLoss(total, out.nats, aux, out.stats)
