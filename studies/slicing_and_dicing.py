"""How many experts, how large, and does the rest matter? The claims of Slicing and Dicing
(arXiv 2605.11689) at the smallest size.

K experts of a token have 96 hidden units together: expert size 1/K of that. `E 64, K 4` is one
arm; executed FLOPs of training are equal, routers included."""

from collections.abc import Sequence
from typing import Any

from headway.lab.experiment import Arm
from headway.lab.measurement import Verdict
from headway.lab.rows import Row
from headway.lab.study import Claim, Contrast, Rule, Study
from studies.narrow import ACTIVE, CORPUS, SEEDS, means, mixture, series

STEPS = 1000
TOTALS = (8, 32)
"""Hidden units of all experts over those of a token."""
SIZES = (1, 2, 4, 8)
"""K; expert size is 1/K."""
SOURCE = "arXiv 2605.11689, at 20M and more active parameters"
BIAS: dict[str, Any] = {"model__moe__balance__aux": 0.0, "model__moe__balance__bias": "sign"}
QUANTILE: dict[str, Any] = {**BIAS, "model__moe__balance__bias": "quantile"}
MARGIN = 0.01


def arm(n_experts: int, top_k: int = 4, what: str = "", **fields: Any) -> Arm:
    """Return a mixture by its name."""
    return mixture(f"E {n_experts}, K {top_k}{what}", n_experts, top_k, **fields)


SHARED = mixture("E 64, K 3, shared", 64, 3, ACTIVE * 3 // 4, model__moe__d_shared=ACTIVE // 4)
ARMS = (
    *(arm(total * k, k) for total in TOTALS for k in SIZES),
    *(arm(e) for e in (16, 64, 256)),
    *(arm(e, 4, ", capacity 1", model__moe__capacity_factor=1.0) for e in (16, 64)),
    SHARED,
    arm(256, 4, ", bias 0.001", **BIAS),
    arm(256, 4, ", bias 0.02", **BIAS, model__moe__balance__bias_rate=0.02),
    arm(256, 4, ", quantile", **QUANTILE),
)


def claim(id: str, text: str, region: Any, pairs: Sequence[tuple[str, str]], **more: Any) -> Claim:
    """Return a claim on differences of arms, the better one first."""
    contrasts = tuple(Contrast(*pair, STEPS) for pair in pairs)
    return Claim(id, text, SOURCE, contrasts, region, CORPUS, min_seeds=len(SEEDS), **more)


def judge_size(rows: Sequence[Row]) -> Verdict:
    """Say whether the best expert size is the same, up to one step of 2, for both totals."""
    bits = means(rows)
    best = {}
    for total in TOTALS:
        known = {k: bits[arm] for k in SIZES if (arm := f"E {total * k}, K {k}") in bits}
        if not known:
            return Verdict("cannot_tell", f"All sizes at a total of {total} diverged.")
        best[total] = min(known, key=lambda k: known[k])
    steps = abs(SIZES.index(best[TOTALS[0]]) - SIZES.index(best[TOTALS[1]]))
    said = ", ".join(f"1/{k} at a total of {total}" for total, k in best.items())
    return Verdict("holds" if steps <= 1 else "refuted", f"The best size is {said}.")


def judge_shared(rows: Sequence[Row]) -> Verdict:
    """Compare a shared expert with twice as many experts."""
    bits = means(rows)
    base, *others = (bits.get(arm) for arm in ("E 64, K 4", "E 64, K 3, shared", "E 128, K 4"))
    if base is None or None in others:
        return Verdict("cannot_tell", "An arm diverged.")
    shared, doubled = (other - base for other in others if other is not None)
    said = f"A shared expert changes {shared:+.4f} bits/byte, twice the experts {doubled:+.4f}."
    if doubled >= 0:
        return Verdict("cannot_tell", f"{said} Twice the experts do not help here.")
    return Verdict("holds" if abs(shared) < abs(doubled) / 3 else "refuted", said)


STUDY = Study(
    "slicing_and_dicing",
    "How many experts, how large, and does the rest matter?",
    (series(ARMS, STEPS),),
    (
        claim(
            "experts",
            "loss falls with the number of experts up to 64 times the active ones",
            "ordered",
            (("E 64, K 4", "E 16, K 4"), ("E 256, K 4", "E 64, K 4")),
        ),
        claim(
            "dropless-16",
            "of 16 experts, dropless is better than a capacity of 1",
            "better",
            (("E 16, K 4", "E 16, K 4, capacity 1"),),
        ),
        claim(
            "dropless-slope",
            "dropless gains less at more experts",
            "slope",
            (("E 16, K 4", "E 16, K 4, capacity 1"), ("E 64, K 4", "E 64, K 4, capacity 1")),
            x=(4.0, 6.0),
        ),
        claim(
            "bias-fixed",
            "at 256 experts a bias step of 0.001 is worse than the quantile bias",
            "better",
            (("E 256, K 4, quantile", "E 256, K 4, bias 0.001"),),
        ),
        claim(
            "bias-tuned",
            "a step of 0.02 is not",
            "not_worse",
            (("E 256, K 4, bias 0.02", "E 256, K 4, quantile"),),
            margin=MARGIN,
        ),
    ),
    (
        Rule(
            "size",
            "the best expert size does not depend on the total",
            SOURCE,
            "Holds if the sizes of least mean loss at totals 8 and 32 are at most one step of 2 "
            "from each other; refuted if not.",
            judge_size,
        ),
        Rule(
            "shared",
            "a shared expert matters less than a third of twice as many experts",
            SOURCE,
            "Holds if it changes the mean loss by less than a third of what 128 experts in place "
            "of 64 gain; refuted if by more; cannot tell if these gain nothing.",
            judge_shared,
        ),
    ),
    notes="Models of width 32 and 1M bytes of Python: far below the paper's 20M parameters and "
    "tokens. `E 64, K 4`: 64 experts, 4 of them per token, 96 hidden units together.",
)
