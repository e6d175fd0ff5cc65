"""Validation loss in nats per token and in bits per byte."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.data.stream import Batch, Stream
from headway.model.transformer import Transformer


@dataclass(frozen=True)
class Evaluation:
    """Sums over the validation batches, as means."""

    val_loss: float
    """Nats per token."""
    val_bits_per_byte: float
    """Σ −log p / (ln 2 · bytes of the target text)."""


def micro_batches(batch: Batch, size: int, device: torch.device) -> list[Batch]:
    """The rows of a batch in pieces of at most `size` rows, on `device`."""

    def moved(part: Tensor | None) -> list[Tensor | None]:
        if part is None:
            return [None] * -(-len(batch.tokens_BS) // size)
        return [p.to(device, non_blocking=True) for p in part.split(size)]

    parts = zip(*map(moved, (batch.tokens_BS, batch.targets_BS, batch.doc_BS)), strict=True)
    return [Batch(*part) for part in parts]  # type: ignore[arg-type]


def count_targets(batch: Batch, token_bytes_V: Tensor) -> tuple[int, int]:
    """(valid targets, bytes of their text) of a batch; `token_bytes_V` int64 `[V]`, 0 for special
    tokens."""
    valid = batch.targets_BS[batch.targets_BS >= 0]
    return valid.numel(), int(token_bytes_V[valid].sum())


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Nats summed over a text, per byte of it, in bits; NaN for a text without bytes."""
    return nats / (math.log(2) * n_bytes) if n_bytes else math.nan


@torch.no_grad()
def evaluate(
    model: Transformer, stream: Stream, token_bytes_V: Tensor, n_batches: int, micro_batch_size: int
) -> Evaluation:
    """The first `n_batches` validation batches (0: all of them), always the same ones.

    Sums in float64 and divides once, so the result does not depend on the micro-batch beyond
    float32 rounding.
    """
    wanted = min(n_batches or stream.n_val_batches, stream.n_val_batches)
    device = model.embed.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets = n_bytes = 0
    was_training = model.training
    model.eval()
    for i in range(wanted):
        batch = stream.val_batch(i)
        for micro in micro_batches(batch, micro_batch_size, device):
            nats = model(micro.tokens_BS, micro.targets_BS, micro.doc_BS).nats
            total += nats
        counted = count_targets(batch, token_bytes_V)
        targets, n_bytes = targets + counted[0], n_bytes + counted[1]
    model.train(was_training)
    nats = float(total)
    return Evaluation(nats / targets, bits_per_byte(nats, n_bytes))
