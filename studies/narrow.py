"""Narrow models for studies of many designs in minutes: two layers of width 32, steps of 1,024
bytes of Python, experts by AdamW, whose step costs the same whatever their number."""

from collections.abc import Sequence
from typing import Any

from headway.lab.experiment import Arm, Experiment
from headway.lab.rows import Row, of_one_text
from headway.lab.study import Series
from headway.train.budget import Budget
from studies.arms import design

CORPUS, WIDTH, ACTIVE = "python", 32, 96
"""ACTIVE: hidden units of a token's experts together."""
SEEDS = (101, 102, 103)


def mixture(name: str, n_experts: int, top_k: int = 4, active: int = ACTIVE, **fields: Any) -> Arm:
    """Return a flat mixture whose experts of a token have `active` hidden units together, and whose
    gates are the softmax over all experts, which one expert of a token needs."""
    sizes = {
        "model__n_layers": 2,
        "model__d_model": WIDTH,
        "model__n_heads": 2,
        "model__moe__n_experts": n_experts,
        "model__moe__top_k": top_k,
        "model__moe__d_expert": active // top_k,
        "model__moe__router__gate": "softmax_topk",
        "optim__muon_experts": False,
        "optim__warmup_steps": 50,
        "data__batch_size": 8,
    }
    return Arm(name, design("moe", CORPUS, **{**sizes, **fields}))


def series(arms: tuple[Arm, ...], steps: int, seeds: tuple[int, ...] = SEEDS) -> Series:
    """Return runs of as many executed FLOPs as the first arm has in so many steps."""
    budget = Budget(steps=steps)
    experiment = Experiment(arms, seeds, budget, eval_tokens=1 << 18, evaluations=1)
    return Series("confirm", CORPUS, experiment, (steps,))


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Return the mean bits per byte of each arm; one with a diverged run has none. Raises
    UsageError for runs on several texts."""
    bits: dict[str, list[float | None]] = {}
    for row in of_one_text(rows):
        bits.setdefault(row["arm"], []).append(row["bits_per_byte"])
    whole = {arm: [b for b in values if b is not None] for arm, values in bits.items()}
    return {arm: sum(v) / len(v) for arm, v in whole.items() if len(v) == len(bits[arm])}
