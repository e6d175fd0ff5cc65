"""How much of a synthetic world a model has learned, beside what shallow guesses reach."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from headway.data.worlds.source import WorldSource
from headway.data.worlds.world import WorldSplit, written
from headway.eval.floors import Floors, floors
from headway.model.transformer import Transformer

LOGITS = 1 << 24
"""Logits that are in memory at once."""
_FLOOR_ITEMS = 512
"""Training items from which the floors learn."""


@dataclass(frozen=True)
class WorldScore:
    """A model on items of a world that it was not trained on."""

    items: int
    targets: int
    accuracy: float
    """Share of the targets that are the model's likeliest word, of all its vocabulary."""
    exact: float
    """Share of the items with all targets right."""
    loss: float
    """Nats per target."""
    floors: Floors
    """The accuracy of shallow guesses on the same items."""

    def numbers(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {**vars(self), "floors": self.floors._asdict()}


@torch.no_grad()
def score(
    model: Transformer,
    vocab_size: int,
    source: WorldSource,
    n: int,
    split: WorldSplit = "test",
    seed: int = 0,
) -> WorldScore:
    """Return the score on the first `n` items of a split; `vocab_size`: of the tokenizer."""
    T = source.world.n_tokens
    size = max(1, LOGITS // (T * vocab_size))
    nats, right, asked = 0.0, [], []
    for begin in range(0, n, size):
        index_B = np.arange(begin, min(begin + size, n), dtype=np.uint64)
        rows = source.rows(split, index_B, T, seed)
        tokens_BT, targets_BT = (
            torch.from_numpy(x).to(model.device) for x in (rows.tokens_BS, rows.targets_BS)
        )
        logits_BTV = model(tokens_BT).logits_BSV
        assert logits_BTV is not None
        logits_BTV, asked_BT = logits_BTV[..., :vocab_size], targets_BT >= 0
        nats += float(F.cross_entropy(logits_BTV[asked_BT], targets_BT[asked_BT], reduction="sum"))
        right.append(((logits_BTV.argmax(-1) == targets_BT) & asked_BT).cpu().numpy())
        asked.append(asked_BT.cpu().numpy())
    right_BT, asked_BT = np.concatenate(right), np.concatenate(asked)
    targets = int(asked_BT.sum())
    return WorldScore(
        items=n,
        targets=targets,
        accuracy=float(right_BT.sum() / targets),
        exact=float((right_BT == asked_BT).all(1).mean()),
        loss=nats / targets,
        floors=floors(
            written(source.world, "train", np.arange(_FLOOR_ITEMS, dtype=np.uint64), seed),
            written(source.world, split, np.arange(n, dtype=np.uint64), seed),
            len(source.world.words),
        ),
    )
