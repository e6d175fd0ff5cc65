"""Validation loss in nats per token and in bits per byte, and of each document."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headway.data.batch import micro_batches, rank_rows
from headway.data.stream import Stream
from headway.eval.calibration import BINS, Calibration, of_next_tokens
from headway.eval.copying import copied
from headway.eval.token_losses import TokenLosses
from headway.model.context import Context
from headway.model.transformer import Transformer
from headway.parallel.fsdp import reshard
from headway.parallel.parallelize import SINGLE_PROCESS, Parallelism
from headway.parallel.reduce import sum_over


@dataclass(frozen=True)
class DocumentLosses:
    """The loss of each document over the windows of an evaluation; documents that the windows do
    not touch are left out."""

    hash_N: np.ndarray
    """uint64, the hash of its ids (`data.document_index`)."""
    nats_N: np.ndarray
    """float64, Σ −log p."""
    targets_N: np.ndarray
    """int64, the number of its targets."""
    bytes_N: np.ndarray
    """float64, bytes of text that its targets stand for."""
    copied_nats_N: np.ndarray
    """float64, the part of `nats_N` at targets that a window gives away (`eval.copying`)."""
    copied_bytes_N: np.ndarray
    """float64, their bytes."""

    @property
    def bits_per_byte(self) -> float:
        """Return the bits per byte of all documents together."""
        return bits_per_byte(float(self.nats_N.sum()), float(self.bytes_N.sum()))

    @property
    def bits_per_byte_uncopied(self) -> float:
        """Return the bits per byte of the targets that no window gives away."""
        nats, n_bytes = (self.nats_N - self.copied_nats_N), (self.bytes_N - self.copied_bytes_N)
        return bits_per_byte(float(nats.sum()), float(n_bytes.sum()))

    def save(self, path: Path) -> None:
        """Write an .npz file, complete or not at all. Raises OSError."""
        temporary = path.with_name(f".{path.name}")
        with temporary.open("wb") as file:
            np.savez(file, **vars(self))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "DocumentLosses":
        """Read what `save` wrote. Raises OSError, ValueError or TypeError for another file."""
        with np.load(path) as arrays:
            return cls(**arrays)


@dataclass(frozen=True)
class Evaluation:
    """The loss on the validation windows."""

    val_loss: float
    """Nats per valid target."""
    val_bits_per_byte: float
    """Σ −log p / (ln 2 · bytes of the target text)."""
    documents: DocumentLosses | None = field(default=None, repr=False, compare=False)
    """Its parts; None where the text has no documents."""
    calibration: Calibration | None = field(default=None, repr=False, compare=False)
    """Of the likeliest next tokens; None in one that was read from a checkpoint."""

    def numbers(self) -> dict[str, float]:
        """Return what a record and a checkpoint keep; `Evaluation(**…)` takes it."""
        return {"val_loss": self.val_loss, "val_bits_per_byte": self.val_bits_per_byte}

    def reliability(self) -> dict[str, Any]:
        """Return `val_calibration_error` and `reliability`, the bins, of a record."""
        if self.calibration is None:
            return {}
        bins = self.calibration.bins()
        columns = {name: [row[name] for row in bins] for name in bins[0]}
        return {"val_calibration_error": self.calibration.error, "reliability": columns}


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
    token_losses: TokenLosses | None = None,
) -> Evaluation:
    """Return the loss on the first `n_windows` validation windows, always the same ones;
    `token_losses` gets that of each token.

    Each rank takes `micro_batch_size` of them at a time. Sums are float64, so the result depends
    neither on the micro-batch nor on the number of ranks beyond float32 rounding. Collective."""
    device, mesh, hash_N = model.device, parallelism.mesh, stream.val_documents
    sums, calibration_3B = np.zeros((5, len(hash_N))), np.zeros((3, BINS))
    was_training = model.training
    model.eval()
    for begin in range(0, n_windows, micro_batch_size * mesh.size):
        end = min(begin + micro_batch_size * mesh.size, n_windows)
        batch = rank_rows(stream.val_windows(begin, end), mesh.rank, mesh.size)
        for micro in micro_batches(batch, micro_batch_size, device):
            ctx = Context(micro.doc_BS, dispatcher=parallelism.dispatcher, best_log_probs=True)
            out = model(micro.tokens_BS, micro.targets_BS, ctx)
            log_probs_BS, best_BS = out.log_probs_BS, out.best_log_probs_BS
            calibration_3B += of_next_tokens(log_probs_BS, best_BS, micro.targets_BS).sums_3B
            copied_BS = copied(micro.tokens_BS, micro.targets_BS)
            if token_losses is not None:
                token_losses.add(-log_probs_BS, micro.targets_BS)
            values = (-log_probs_BS, micro.targets_BS >= 0, micro.bytes_BS)
            values += (-log_probs_BS * copied_BS, micro.bytes_BS * copied_BS)
            document_T = micro.document_BS.flatten().cpu().numpy()
            for i, value_BS in enumerate(values):
                value_T = value_BS.flatten().double().cpu().numpy()
                sums[i] += np.bincount(document_T, value_T, len(hash_N))
    reshard(model)
    model.train(was_training)
    if token_losses is not None:
        ranks = mesh.all_gather_object(token_losses)
        token_losses.merge([losses for rank, losses in enumerate(ranks) if rank != mesh.rank])
    flat = torch.from_numpy(np.concatenate([sums.ravel(), calibration_3B.ravel()])).to(device)
    total = sum_over(mesh.world, flat, mesh, "evaluation").cpu().numpy()
    nats_N, targets_N, bytes_N, *of_copied = total[: sums.size].reshape(sums.shape)
    calibration = Calibration(total[sums.size :].reshape(calibration_3B.shape))
    seen = targets_N > 0
    parts = hash_N[seen], nats_N[seen], targets_N[seen].astype(np.int64), bytes_N[seen]
    documents = DocumentLosses(*parts, *(x_N[seen] for x_N in of_copied))
    mean = nats_N.sum() / targets_N.sum()
    return Evaluation(mean, documents.bits_per_byte, documents, calibration)
