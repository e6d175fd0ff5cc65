"""Does a low mean loss tell a right model from a wrong one? (arXiv 2601.22950)

Text `copy`: models that copy up to 16 bits. Asked for n zeros with a 1 among them, a model that
copies zeros and overlooks the 1 pays at one token, whose share of the mean falls with n. Text
`parity`: models that say the parity of up to 16 bits so far at every bit, at six lengths of
training; losses and accuracy on 16 bits, and on 64, for which nothing was trained."""

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from headway import recipes
from headway.config import Config, with_leaf
from headway.lab.experiment import Arm, Experiment
from headway.lab.measurement import Verdict
from headway.lab.rows import Row
from headway.lab.study import Rule, Series, Study
from headway.train.budget import Budget
from studies.long_strings import LENGTHS, scores

STEPS = {"copy": (400,), "parity": (50, 100, 150, 200, 300, 400)}
SEEDS, SOURCE = (1, 2, 3, 4), "arXiv 2601.22950"
SIZES: dict[str, Any] = {
    **{"model.n_layers": 2, "model.d_model": 64, "model.d_ff": 128, "model.n_heads": 2},
    **{"data.seq_len": 32, "data.batch_size": 64},
    "optim.warmup_steps": 20,
}


def config(world: str, options: str) -> Config:
    """Return two dense layers of width 64 on items of 4 to 16 bits."""
    source = tuple(f"world:{world},length={n}{options}" for n in (4, 8, 12, 16))
    values = recipes.load("dense")
    for name, value in {**SIZES, "data.source": source}.items():
        values = with_leaf(values, name, value)
    return values


def judge_copy(rows: Sequence[Row]) -> Verdict:
    few, many = LENGTHS[0], LENGTHS[-1]
    able = [r["scores"] for r in rows if r["scores"] and r["scores"][f"exact, right, {many}"]]
    if not able:
        return Verdict("cannot_tell", f"None of {len(rows)} models copies {many} zeros.")
    exact = [s[f"exact, wrong, {many}"] for s in able]
    gaps = {n: [s[f"nats, wrong, {n}"] - s[f"nats, right, {n}"] for s in able] for n in LENGTHS}
    vanishes = [a <= 0.05 and a < b for a, b in zip(gaps[many], gaps[few], strict=True)]
    holds, refuted = max(exact) == 0 and all(vanishes), min(exact) > 0 or not any(vanishes)
    wrong = min(s[f"largest, wrong, {many}"] for s in able)
    right = max(s[f"largest, right, {many}"] for s in able)
    return Verdict(
        "holds" if holds else "refuted" if refuted else "cannot_tell",
        f"{len(able)} of {len(rows)} models copy {many} zeros. With a 1 among them at most "
        f"{max(exact):.0%} come out exactly, for {median(gaps[many]):.4f} nats per bit more (of "
        f"{few} bits: {median(gaps[few]):.4f}). The largest loss of a token tells them apart: at "
        f"least {wrong:.2f} nats against at most {right:.2f}.",
    )


def correlations(rows: Sequence[Row], loss: str, n: int) -> list[float]:
    """Return the correlation of a loss with accuracy over the lengths of training, by seed."""
    seeds = sorted({row["seed"] for row in rows})
    by_seed = [[r["scores"] for r in rows if r["seed"] == seed and r["scores"]] for seed in seeds]
    pairs = [[[s[f"{loss}, {n}"], s[f"accuracy, {n}"]] for s in said] for said in by_seed]
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN where an accuracy never changes
        return [float(np.corrcoef(np.transpose(p))[0, 1]) for p in pairs]


def judge_parity(rows: Sequence[Row]) -> Verdict:
    inside, outside = correlations(rows, "nats", 16), correlations(rows, "nats", 64)
    holds = max(inside) < 0 <= min(outside)
    answer = "holds" if holds else "refuted" if mean(outside) < -0.5 else "cannot_tell"
    return Verdict(answer, f"By seed, 16 bits: {words(inside)}; 64 bits: {words(outside)}.")


def judge_tail(rows: Sequence[Row]) -> Verdict:
    tail, average = correlations(rows, "tail", 64), correlations(rows, "nats", 64)
    holds = all(t < min(0, a) for t, a in zip(tail, average, strict=True))
    answer = "holds" if holds else "refuted" if min(tail) > 0 else "cannot_tell"
    return Verdict(answer, f"By seed, 90% quantile: {words(tail)}; mean: {words(average)}.")


def words(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values)


def series(world: str, options: str = "") -> Series:
    experiment = Experiment((Arm("dense", config(world, options)),), SEEDS, Budget(steps=400))
    return Series("confirm", world, experiment, STEPS[world])


RULES = (
    Rule(
        "copy",
        "A copy with one wrong bit costs no more per bit than a right one, as strings grow.",
        SOURCE,
        "Read models that copy 512 zeros. Holds if none copies any of 8 strings with a 1 among the "
        "zeros, and each pays at most 0.05 nats per bit more for them, less than at 32 bits; "
        "refuted if every one copies some or none pays so little.",
        judge_copy,
        ("copy",),
    ),
    Rule(
        "parity",
        "Over checkpoints, mean loss and accuracy correlate negatively on the lengths of training, "
        "and not on longer strings.",
        SOURCE,
        "Holds if, for every seed, the correlation over six lengths of training is below 0 on 16 "
        "bits and at least 0 on 64; refuted if on 64 bits its mean over seeds is below −0.5.",
        judge_parity,
        ("parity",),
    ),
    Rule(
        "quantile",
        "There, the 90% quantile of the losses of tokens ranks rightly.",
        "Rule for engineers: not the mean alone",
        "Holds if, for every seed, it correlates with accuracy on 64 bits below 0 and below the "
        "mean loss; refuted if it correlates above 0 for every seed.",
        judge_tail,
        ("parity",),
    ),
)
STUDY = Study(
    "perplexity_misleads",
    "Does a low mean loss tell a right model from a wrong one?",
    (series("copy"), series("parity", ",running=1")),
    rules=RULES,
    scores=scores,
    notes="Two dense layers of width 64, trained on items of 4 to 16 bits. Registered with eight "
    "seeds at first, and with four before any row, for lack of time. That copies are learned in so "
    "many steps was seen with one other seed before.",
)
