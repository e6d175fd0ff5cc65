"""How many distinct experts does a decoding step touch, beside what uniform routing would?

`plan/decode.py` predicts the bytes of a step by H·E·(1 − (1 − K/E)^B). The routes of trained models
say what is touched: a step is one position of B texts, of one topic or of many. The third column
keeps each expert's load and draws independently, so it tells skew from correlation."""

from collections.abc import Sequence

import numpy as np

from headway.lab.measurement import Measurement, Row, Verdict
from headway.plan.decode import touched
from studies.routes import ARMS, routes

BATCHES = (1, 4, 16, 64)
TOLERANCE = 0.1


def distinct(index_NSLHK: np.ndarray, n_experts: int, batch: int) -> float:
    """Mean number of (layer, head, expert) that a step of `batch` sequences touches."""
    N, S, layers, H, _ = index_NSLHK.shape
    hit = np.zeros((N // batch, S, layers, H, n_experts), bool)
    for i in range(batch):
        chosen = index_NSLHK[i::batch][: N // batch]
        np.put_along_axis(hit, chosen.astype(np.int64), True, -1)
    return float(hit.sum((-3, -2, -1)).mean())


def independent(index_NSLHK: np.ndarray, n_experts: int, batch: int) -> float:
    """The number if tokens chose independently, each expert by its own share of these tokens."""
    one = np.stack([(index_NSLHK == e).any(-1).mean((0, 1)) for e in range(n_experts)], -1)
    return float((1 - (1 - one) ** batch).sum())


def measure() -> list[Row]:
    rows = []
    for arm in ARMS:
        recorded = routes(arm)
        E = recorded.layers[0].config.n_experts
        for text, parts in (("one topic", recorded.one_topic), ("mixed", [recorded.mixed])):
            for batch in BATCHES:
                uniform = sum(touched(layer, batch) for layer in recorded.layers)
                counted = float(np.mean([distinct(part, E, batch) for part in parts]))
                skewed = float(np.mean([independent(part, E, batch) for part in parts]))
                rows.append(
                    {
                        "model": arm,
                        "text": text,
                        "batch": batch,
                        "touched": counted,
                        "uniform": uniform,
                        "touched / uniform": counted / uniform,
                        "independent, own loads / uniform": skewed / uniform,
                    }
                )
    return rows


def judge(rows: Sequence[Row]) -> Verdict:
    ratios = [row["touched / uniform"] for row in rows]
    within = all(abs(ratio - 1) <= TOLERANCE for ratio in ratios)
    worst = min(rows, key=lambda row: row["touched / uniform"])
    return Verdict(
        "holds" if within else "refuted",
        f"Touched over uniform is {min(ratios):.2f} to {max(ratios):.2f}; least for "
        f"{worst['model']}, {worst['text']}, batch {worst['batch']}.",
    )


STUDY = Measurement(
    "experts_touched",
    "The uniform formula predicts the distinct experts of a decoding step of a trained model "
    "within 10%, whatever the texts.",
    "Holds if touched over uniform is within 0.9 … 1.1 for both models, one topic and mixed, at "
    "batches 1 to 64; else refuted.",
    measure,
    judge,
)
