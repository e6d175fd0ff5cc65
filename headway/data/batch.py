"""A batch of token windows, and how its rows are divided into micro-batches and among ranks."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B windows of text. `targets_BS[b, s]` is the token after `tokens_BS[b, s]`, or −1 where there
    is none to predict.

    A trainer that needs more per row (token weights, advantages) adds fields in a subclass. Every
    field is None or a tensor whose first dim is B."""

    tokens_BS: Tensor
    """int64."""
    targets_BS: Tensor
    """int64."""
    doc_BS: Tensor | None
    """int32, the number of the token's document in its row, from 0; an eos belongs to the document
    that it ends. None unless `doc_mask`."""
    bytes_B: Tensor | None = None
    """float64, bytes of text that the targets of a row stand for; None where not counted."""


@dataclass(frozen=True, kw_only=True)
class ValidationBatch(Batch):
    """B windows of validation text, whose targets know their documents."""

    document_BS: Tensor
    """int64, the number of the target's document among those of all sources; 0 without a target."""
    bytes_BS: Tensor
    """float64, bytes of text that a target stands for."""


B = TypeVar("B", bound=Batch)


def micro_batches(batch: B, size: int, device: torch.device) -> list[B]:
    """Return the rows of `batch` on `device`, in order, at most `size` of them in a micro-batch.
    Each field is copied once, to a GPU from pinned memory: the host does not wait for it."""

    def copied(x: Tensor) -> Tensor:
        x = x.pin_memory() if device.type == "cuda" else x
        return x.to(device, non_blocking=True)

    fields = {
        name: copied(value).split(size) for name, value in vars(batch).items() if value is not None
    }
    parts = zip(*fields.values(), strict=True)
    return [replace(batch, **dict(zip(fields, p, strict=True))) for p in parts]


def rank_rows(batch: B, rank: int, world: int) -> B:
    """Return the rows of one rank, as many on each; rows without targets pad those of the last."""
    if world == 1:
        return batch
    missing = -len(batch.tokens_BS) % world
    each = (len(batch.tokens_BS) + missing) // world

    def rows(x: Tensor, fill: int) -> Tensor:
        padded = torch.cat([x, x.new_full((missing, *x.shape[1:]), fill)])
        return padded[rank * each : (rank + 1) * each]

    fields = {
        name: rows(x, -1 if name == "targets_BS" else 0)
        for name, x in vars(batch).items()
        if x is not None
    }
    return replace(batch, **fields)
