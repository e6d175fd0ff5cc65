"""Validation loss in nats per token and in bits per byte."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.data.stream import Batch, Stream
from headway.model.transformer import Transformer
from headway.parallel.dispatcher import SINGLE_PROCESS, Parallelism
from headway.parallel.fsdp import reshard
from headway.parallel.reduce import sum_over


@dataclass(frozen=True)
class Evaluation:
    """Sums over the validation windows, as means."""

    val_loss: float
    """Nats per token."""
    val_bits_per_byte: float
    """Σ −log p / (ln 2 · bytes of the target text)."""


def micro_batches(batch: Batch, size: int, device: torch.device) -> list[Batch]:
    """The rows of a batch in pieces of at most `size` rows, on `device`; their bytes are counted
    with the whole batch."""

    def moved(part: Tensor | None) -> list[Tensor | None]:
        if part is None:
            return [None] * -(-len(batch.tokens_BS) // size)
        return [p.to(device, non_blocking=True) for p in part.split(size)]

    parts = zip(*map(moved, (batch.tokens_BS, batch.targets_BS, batch.doc_BS)), strict=True)
    return [Batch(*part) for part in parts]  # type: ignore[arg-type]


def count_targets(batch: Batch) -> tuple[int, float]:
    """(valid targets, bytes of their text) of a batch from a `Stream`."""
    assert batch.bytes_B is not None
    return int((batch.targets_BS >= 0).sum()), float(batch.bytes_B.sum())


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Nats summed over a text, per byte of it, in bits; NaN for a text without bytes."""
    return nats / (math.log(2) * n_bytes) if n_bytes else math.nan


@torch.no_grad()
def evaluate(
    model: Transformer,
    stream: Stream,
    n_windows: int,
    micro_batch_size: int,
    parallelism: Parallelism = SINGLE_PROCESS,
) -> Evaluation:
    """The loss on the first `n_windows` validation windows, always the same ones.

    Each rank takes `micro_batch_size` of them at a time. Sums in float64 and divides once, so the
    result depends neither on the micro-batch nor on the number of ranks beyond float32 rounding.
    """
    device, mesh = model.embed.weight.device, parallelism.mesh
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for begin in range(0, n_windows, micro_batch_size * mesh.size):
        end = min(begin + micro_batch_size * mesh.size, n_windows)
        batch = share(stream.val_windows(begin, end), mesh.rank, mesh.size)
        for micro in micro_batches(batch, micro_batch_size, device):
            sums[0] += model(
                micro.tokens_BS, micro.targets_BS, micro.doc_BS, parallelism.dispatcher
            ).nats
        sums[1:] += torch.tensor(count_targets(batch), dtype=torch.float64, device=device)
    reshard(model)
    model.train(was_training)
    nats, targets, n_bytes = sum_over(mesh.world, sums, mesh, "evaluation").tolist()
    return Evaluation(nats / targets, bits_per_byte(nats, n_bytes))


def share(batch: Batch, rank: int, world: int) -> Batch:
    """The rows of one rank, as many on each; rows without targets fill up the last ones."""
    if world == 1:
        return batch
    missing = -len(batch.tokens_BS) % world
    each = (len(batch.tokens_BS) + missing) // world

    def rows(part: Tensor, fill: int = 0) -> Tensor:
        filled = torch.cat([part, part.new_full((missing, *part.shape[1:]), fill)])
        return filled[rank * each : (rank + 1) * each]

    doc_BS, bytes_B = (
        None if part is None else rows(part) for part in (batch.doc_BS, batch.bytes_B)
    )
    return Batch(rows(batch.tokens_BS), rows(batch.targets_BS, -1), doc_BS, bytes_B)
