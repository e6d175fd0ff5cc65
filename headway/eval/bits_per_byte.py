"""Validation loss in nats per token and in bits per byte."""

import math
from dataclasses import dataclass

import torch

from headway.data.batch import count_targets, micro_batches, rank_rows
from headway.data.stream import Stream
from headway.model.context import Context
from headway.model.transformer import Transformer
from headway.parallel.fsdp import reshard
from headway.parallel.parallelize import SINGLE_PROCESS, Parallelism
from headway.parallel.reduce import sum_over


@dataclass(frozen=True)
class Evaluation:
    """The loss on the validation windows."""

    val_loss: float
    """Nats per valid target."""
    val_bits_per_byte: float
    """Σ −log p / (ln 2 · bytes of the target text)."""


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Return the bits per byte of a text with a loss of `nats` in all; NaN without bytes."""
    return nats / (math.log(2) * n_bytes) if n_bytes else math.nan


@torch.no_grad()
def evaluate(
    model: Transformer,
    stream: Stream,
    n_windows: int,
    micro_batch_size: int,
    parallelism: Parallelism = SINGLE_PROCESS,
) -> Evaluation:
    """Return the loss on the first `n_windows` validation windows, always the same ones.

    Each rank takes `micro_batch_size` of them at a time. Sums are float64 and divided once, so the
    result depends neither on the micro-batch nor on the number of ranks beyond float32 rounding.
    Collective."""
    device, mesh = model.device, parallelism.mesh
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for begin in range(0, n_windows, micro_batch_size * mesh.size):
        end = min(begin + micro_batch_size * mesh.size, n_windows)
        batch = rank_rows(stream.val_windows(begin, end), mesh.rank, mesh.size)
        for micro in micro_batches(batch, micro_batch_size, device):
            ctx = Context(micro.doc_BS, dispatcher=parallelism.dispatcher)
            sums[0] += model(micro.tokens_BS, micro.targets_BS, ctx).nats
        sums[1:] += torch.tensor(count_targets(batch), dtype=torch.float64, device=device)
    reshard(model)
    model.train(was_training)
    nats, targets, n_bytes = sum_over(mesh.world, sums, mesh, "evaluation").tolist()
    return Evaluation(nats / targets, bits_per_byte(nats, n_bytes))
