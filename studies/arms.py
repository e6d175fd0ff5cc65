"""The designs that studies compare, at one width and on one text.

Width 128: four layers, for the flat mixture eight of 32 experts with K·F = 3·D per token (recipe
`moe`, narrower), Muon, 4,096 tokens per step. Others have its executed FLOPs per token and its
total parameters (`headway.lab.match`). Width 256 is the same with heads of attention twice as
wide."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headway import recipes
from headway.config import Config, with_leaf
from headway.lab.experiment import Arm, Experiment
from headway.lab.match import Quantity
from headway.lab.rows import Row, of_one_text
from headway.lab.study import Claim, Contrast, Prediction, Series, Stage
from headway.train.budget import Budget
from headway.train.open_session import Edit

TEXTS: dict[str, dict[str, Any]] = {
    "python": {"data.source": ("set:python",), "data.near_duplicates": "cluster"},
    "python, 8k": {
        "data.source": ("set:python",),
        "data.near_duplicates": "cluster",
        "data.batch_size": 64,
    },
    "python, near-copies split": {"data.source": ("set:python",)},
    "kernel-docs": {"data.source": ("set:kernel-docs",), "data.near_duplicates": "cluster"},
}
EVAL_TOKENS = 1 << 19
"""Of every validation, at the end of a run: 4,096 windows of 128 bytes, spread over the split."""
WARM_UP = 25
"""Steps: the same for all budgets, so that they branch off one trunk."""
PAIRS = 8
"""Of confirming runs, before which nothing is said of them: one look."""
WHERE = (
    "Width 128, four layers, Muon, steps of 4,096 bytes (256 of them are 1M bytes). `flat` is a "
    "mixture of 32 experts of width 48, 8 of them per token; `NxL` is Multi-Head LatentMoE as "
    "published, with N heads of width L, and `N slices` the same without learned projections. "
    "Executed FLOPs per token and total parameters are those of the baseline within 1%, where "
    "nothing else is said. `python` is `--corpus set:python`, near-copies on one side of the split."
)
"""What a reader of the page needs to know of these runs."""
RATE = {"2x64": 0.7, "2 slices": 0.7}
"""Arm → the factor of its experts' learning rate by the screening of `latent_vs_flat`; others have
1."""


def design(recipe: str, corpus: str, **fields: Any) -> Config:
    """Return a recipe on a text, with fields of its config changed; `__` stands for the dot."""
    config = with_leaf(recipes.load(recipe), "optim.warmup_steps", WARM_UP)
    changes = {**TEXTS[corpus], **{name.replace("__", "."): v for name, v in fields.items()}}
    for name, value in changes.items():
        config = with_leaf(config, name, value)
    return config


def flat(
    corpus: str, name: str = "flat", edit: Edit | None = None, width: int = 128, **fields: Any
) -> Arm:
    """Return the flat mixture, the baseline."""
    sizes = {"model__d_model": width, "model__moe__d_expert": 3 * width // 8}
    return Arm(name, design("moe", corpus, **{**sizes, **fields}), edit)


def heads(
    corpus: str, n: int, name: str = "", edit: Edit | None = None, width: int = 128, **fields: Any
) -> Arm:
    """Return Multi-Head LatentMoE as published, with n heads."""
    sizes = {"model__d_model": width, "model__moe__n_heads": n}
    config = design("multi_head_latent", corpus, **{**sizes, **fields})
    return Arm(name or f"{n}x{width // n}", config, edit)


def slices(corpus: str, n: int, name: str = "", edit: Edit | None = None, **fields: Any) -> Arm:
    """Return n heads without learned projections: slices of the block's normed input."""
    fields = {"model__moe__projection": "none", **fields}
    return heads(corpus, n, name or f"{n} slices", edit, **fields)


def rated(
    make: Callable[..., Arm],
    corpus: str,
    *args: Any,
    width: int = 128,
    rate: float = 0.0,
    **fields: Any,
) -> Arm:
    """Return an arm with the experts' learning rate of the screening, or another one."""
    plain = make(corpus, *args, width=width)
    wide = plain.name if width == 128 else f"{plain.name}, D {width}"
    factor = rate or RATE.get(wide, 1.0)
    if factor != 1.0:
        fields = {**fields, "optim__expert_lr_scale": factor}
    label = f"{wide}, rate {rate:g}" if rate else wide
    return make(corpus, *args, name=label, width=width, **fields)


def series(
    stage: Stage,
    corpus: str,
    arms: tuple[Arm, ...],
    seeds: tuple[int, ...],
    steps: tuple[int, ...],
    match: tuple[Quantity, ...] = ("active-flops", "total-parameters"),
    free: tuple[str, ...] = (),
) -> Series:
    """Return runs that are evaluated once, at their end; the first arm is the baseline."""
    experiment = Experiment(
        arms,
        seeds,
        Budget(steps=max(steps)),
        match=match,
        free=free,
        eval_tokens=EVAL_TOKENS,
        evaluations=1,
    )
    return Series(stage, corpus, experiment, steps)


def at_each(expected: Mapping[int, Prediction], claim: Claim) -> tuple[Claim, ...]:
    """Return a claim on one contrast at each of the budgets, steps of the baseline, with what is
    expected there."""
    return tuple(
        replace(
            claim,
            id=f"{claim.id}-{steps}",
            contrasts=(claim.contrasts[0]._replace(steps=steps),),
            prediction=prediction,
        )
        for steps, prediction in expected.items()
    )


def differences(rows: Sequence[Row], stage: Stage, contrast: Contrast) -> list[float]:
    """Return the paired differences of a contrast, bits per byte, in the order of the seeds of its
    baseline; a pair with a diverged run is left out. Raises UsageError for runs on several
    texts."""
    arms = contrast.arm, contrast.baseline
    chosen = [
        row
        for row in rows
        if (row["stage"], row["budget"]) == (stage, contrast.steps) and row["arm"] in arms
    ]
    bits = {(row["arm"], row["seed"]): row["bits_per_byte"] for row in of_one_text(chosen)}
    seeds = [seed for arm, seed in bits if arm == contrast.baseline]
    pairs = [(bits.get((contrast.arm, seed)), bits[contrast.baseline, seed]) for seed in seeds]
    return [a - b for a, b in pairs if a is not None and b is not None]
