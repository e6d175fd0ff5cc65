"""What a small model of copying or of parity does on strings longer than those it learned from."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from headway.data.worlds.source import WorldSource
from headway.hub.load import LoadedModel, load_model
from headway.model.context import Context

LENGTHS, FLIPS, ITEMS = (32, 128, 512), 8, 128
"""Bits to copy, strings of each with one bit flipped, and strings whose parity is asked for."""


def scores(folder: Path) -> Mapping[str, float]:
    """Return what a run does on items longer than those of training."""
    loaded = load_model(folder, "cpu", "float32", 1)
    if "copy" in loaded.config.data.source[0]:
        return {k: v for n in LENGTHS for k, v in copying(loaded, n).items()}
    return {**parity(loaded, 16), **parity(loaded, 64)}


def copying(loaded: LoadedModel, n: int) -> dict[str, float]:
    """Return losses of copies of n zeros (right), and of n − 1 zeros with a 1 at one of 8 places
    (wrong), where the model reads what is to be copied, and which of them come out exactly."""
    zero, one, bar = (int(i) for i in loaded.tokenizer.encode("0 1 |"))
    bits = np.full((FLIPS + 1, n), zero)
    bits[np.arange(FLIPS), np.linspace(0, n - 1, FLIPS).astype(int)] = one
    tokens = np.concatenate([bits, np.full((FLIPS + 1, 1), bar), bits[:, :-1]], 1)
    nats, right = losses(loaded, tokens, np.concatenate([np.full((FLIPS + 1, n), -1), bits], 1))
    return {
        f"nats, right, {n}": float(nats[-1].mean()),
        f"nats, wrong, {n}": float(nats[:-1].mean()),
        f"largest, right, {n}": float(nats[-1].max()),
        f"largest, wrong, {n}": float(nats[:-1].max(1).min()),
        f"exact, right, {n}": float(right[-1].all()),
        f"exact, wrong, {n}": float(right[:-1].all(1).mean()),
    }


def parity(loaded: LoadedModel, n: int) -> dict[str, float]:
    """Return mean nats, their 90% quantile and the accuracy over all bits of strings of n bits."""
    source = WorldSource.open(f"world:parity,length={n},running=1", loaded.tokenizer)
    rows = source.rows("test", np.arange(ITEMS, dtype=np.uint64), n)
    nats, right = losses(loaded, rows.tokens_BS, rows.targets_BS)
    tail = float(np.quantile(nats, 0.9))
    return {f"nats, {n}": nats.mean(), f"tail, {n}": tail, f"accuracy, {n}": right.mean()}


@torch.no_grad()
def losses(loaded: LoadedModel, tokens: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    """Return −log p of the targets, and whether nothing is likelier, each [items, targets]."""
    ctx = Context(best_log_probs=True)
    out = loaded.model(torch.from_numpy(tokens), torch.from_numpy(targets), ctx)
    log_probs, best = out.log_probs_BS.double().numpy(), out.best_log_probs_BS.double().numpy()
    asked = targets >= 0
    return [x[asked].reshape(len(tokens), -1) for x in (-log_probs, best == log_probs)]
