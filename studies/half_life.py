"""How does success fall with the number of chained operations, and with what lies in between?

A model learns running products of permutations of three, or running parity, of sequences of one
length. That it is right at every place up to t is its survival of t operations. An exponential law
has a constant hazard; a Weibull law, S(t) = exp(−(t/λ)^K), one that grows (K > 1) or falls. T50 and
T80 are the operations that half and 80% of the items survive. Recall is asked with more blanks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from headway.data.worlds.mqar import Mqar
from headway.eval.worlds import score
from headway.lab.measurement import Verdict
from headway.lab.rows import Row
from headway.lab.study import Rule, Study
from studies.world_arms import arm, at_length, mean_wrong, opened, series

WORLDS = {
    "s3": "s3,length=16",
    "parity": "parity,length=16,running=1",
    "recall": "mqar,pairs=4,length=16",
}
SEEDS = (101, 102, 103)
STEPS = 500
ITEMS = 2048
FILLED = (16, 24, 32, 48)
"""Tokens of an item of recall; 16 in training."""


def scores(folder: Path) -> dict[str, float]:
    """Return, of chained operations, the shape K, T50 and T80, and the share that has failed within
    16 operations and within 24, more than in training; of recall, targets wrong by length."""
    loaded, source = opened(folder)
    vocab_size, world = loaded.tokenizer.vocab_size, source.world
    if isinstance(world, Mqar):
        lengths = {n: at_length(source, n) for n in FILLED}
        results = {n: score(loaded.model, vocab_size, s, 512) for n, s in lengths.items()}
        return {f"wrong of {n}": 1 - result.accuracy for n, result in results.items()}
    longer = at_length(source, 24)
    rows = longer.rows("test", np.arange(ITEMS, dtype=np.uint64), longer.world.n_tokens)
    with torch.no_grad():
        logits_BSV = loaded.model(torch.from_numpy(rows.tokens_BS)).logits_BSV
    assert logits_BSV is not None
    best_BS = logits_BSV[..., :vocab_size].argmax(-1).numpy()
    asked_S = rows.targets_BS[0] >= 0
    alive_BT = np.logical_and.accumulate((best_BS == rows.targets_BS)[:, asked_S], axis=1)
    trained_BT = alive_BT[:, :16]
    shape, scale = weibull(trained_BT)
    return {
        "Weibull shape K": shape,
        "T50": scale * np.log(2) ** (1 / shape),
        "T80": scale * np.log(1.25) ** (1 / shape),
        "failed by 16": 1 - trained_BT[:, -1].mean(),
        "failed by 24": 1 - alive_BT[:, -1].mean(),
    }


def weibull(alive_BT: np.ndarray) -> tuple[float, float]:
    """Return shape and scale of the Weibull law that fits best, by maximum likelihood over the
    place of the first error of each item; items without one are censored at the end."""
    failed_T = -np.diff(alive_BT.sum(0), prepend=len(alive_BT)).astype(float)
    t_T, last = np.arange(1, alive_BT.shape[1] + 1, dtype=float), float(alive_BT[:, -1].sum())
    shape_G = np.exp(np.linspace(np.log(0.05), np.log(20), 400))[:, None, None]
    scale_G = np.exp(np.linspace(np.log(0.3), np.log(3000), 400))[None, :, None]
    hazard_GT = (t_T / scale_G) ** shape_G
    before_GT = ((t_T - 1) / scale_G) ** shape_G
    died_GT = np.exp(-before_GT) - np.exp(-hazard_GT)
    fit_G = (failed_T * np.log(died_GT.clip(1e-300))).sum(-1) - last * hazard_GT[..., -1]
    i, j = np.unravel_index(fit_G.argmax(), fit_G.shape)
    return float(shape_G[i, 0, 0]), float(scale_G[0, j, 0])


def constant_hazard(rows: Sequence[Row]) -> Verdict:
    known = [row["scores"] for row in rows if row["scores"]["failed by 16"] > 0.05]
    shapes = [one["Weibull shape K"] for one in known]
    if len(shapes) < 2:
        return Verdict("cannot_tell", f"{len(shapes)} of {len(rows)} runs fail often enough.")
    constant = [0.8 <= k <= 1.25 for k in shapes]
    answer = "holds" if all(constant) else "cannot_tell" if any(constant) else "refuted"
    return Verdict(answer, f"K is {', '.join(f'{k:.2f}' for k in sorted(shapes))}.")


def longer_fails(rows: Sequence[Row]) -> Verdict:
    later = []
    for row in rows:
        ended = row["scores"]["failed by 16"]
        if ended < 0.95:
            later.append(1 - ((1 - row["scores"]["failed by 24"]) / (1 - ended)) ** (1 / 8))
    if not later:
        return Verdict("cannot_tell", "No run survives 16 operations.")
    answer = "holds" if min(later) > 0.1 else "refuted" if max(later) < 0.02 else "cannot_tell"
    said = ", ".join(f"{x:.1%}" for x in sorted(later))
    return Verdict(answer, f"Of those alive, per operation beyond training, fail {said}.")


def filler_hurts(rows: Sequence[Row]) -> Verdict:
    worse = [row["scores"]["wrong of 32"] - row["scores"]["wrong of 16"] for row in rows]
    answer = "holds" if min(worse) > 0.02 else "refuted" if max(worse) < 0.02 else "cannot_tell"
    means = ", ".join(f"{mean_wrong(rows, 'recall', 'dense', f'wrong of {n}'):.1%}" for n in FILLED)
    return Verdict(answer, f"Wrong at {', '.join(map(str, FILLED))} tokens: {means}.")


STUDY = Study(
    "half_life",
    "How does success fall with chained operations, and with filler?",
    tuple(
        series(name, (arm("dense", world),), SEEDS, 1200 if name == "recall" else STEPS)
        for name, world in WORLDS.items()
    ),
    rules=(
        Rule(
            "constant",
            "Success falls exponentially with the number of chained operations, within the length "
            "of training.",
            "half-lives of agents' tasks, as if each step failed alike",
            "Holds if the Weibull shape is within 0.8 … 1.25 for all runs that fail in 5% of the "
            "items or more, refuted if for none.",
            constant_hazard,
            ("s3", "parity"),
        ),
        Rule(
            "beyond",
            "Beyond the length of training the hazard jumps.",
            "none: expected of a rotary embedding without longer items",
            "Holds if more than 10% of those alive fail at each operation after the 16th in every "
            "run, refuted if less than 2% in all.",
            longer_fails,
            ("s3", "parity"),
        ),
        Rule(
            "filler",
            "With the facts fixed, twice as much context makes recall worse.",
            "context rot",
            "Holds if each seed has 2% more of the answers wrong at 32 tokens than at 16, those of "
            "training; refuted if none has.",
            filler_hurts,
            ("recall",),
        ),
    ),
    scores=scores,
    notes="Dense, two layers of width 64, trained on 16 operations, or 16 tokens of recall. Forced "
    "thinking tokens are not measured.",
)
