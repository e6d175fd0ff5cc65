"""Paired differences of two arms: intervals, tests, verdicts, and what a study can see at all.

A difference is arm minus baseline, in bits per byte; below 0 the arm is better. Seeds are the unit:
a seed of the arm and the same seed of the baseline make a pair."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from headway.config import UsageError

ALPHA = 0.05
POWER = 0.8
Region = Literal["better", "not_worse", "equal", "ordered", "slope"]
"""Where a claim says that a difference lies, for a margin δ: below −δ, below δ, within ±δ; each of
several differences below −δ; a slope above δ."""
Answer = Literal["holds", "refuted", "cannot_tell"]


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """What the pairs of an arm and its baseline tell; None where one pair tells nothing."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of one difference."""
    ci95: Interval | None
    """Student's t over seeds."""
    p: float | None
    """Two-sided, of no difference."""
    mde80: float | None
    """The smallest true difference that a study like this sees in 80% of cases."""


def paired(differences: Sequence[float]) -> Paired:
    """Return mean, deviation, 95% interval, p and smallest visible difference of paired values."""
    x_N = np.asarray(differences, dtype=np.float64)
    n, mean = len(x_N), float(x_N.mean())
    if n < 2:
        return Paired(n, mean, None, None, None, None)
    sd = float(x_N.std(ddof=1))
    return Paired(n, mean, sd, t_interval(x_N), p_value(x_N), detectable(sd, n))


def t_interval(differences: Sequence[float] | np.ndarray, alpha: float = ALPHA) -> Interval:
    """Return the interval that holds the mean difference with probability 1 − α."""
    n, mean, se = _summary(differences)
    half = float(_special().stdtrit(n - 1, 1 - alpha / 2)) * se
    return Interval(mean - half, mean + half)


def p_value(differences: Sequence[float] | np.ndarray) -> float:
    """Return the two-sided p of Student's t test of no difference; 0 where all differences are
    equal and not 0."""
    n, mean, se = _summary(differences)
    if se == 0:
        return float(mean == 0)
    return float(2 * _special().stdtr(n - 1, -abs(mean) / se))


def p_not_worse(differences: Sequence[float] | np.ndarray, margin: float) -> float:
    """Return the p of non-inferiority: one-sided, of a difference of `margin` or more."""
    return _one_sided(differences, margin)


def p_equal(differences: Sequence[float] | np.ndarray, margin: float) -> float:
    """Return the p of equivalence by two one-sided tests: the larger of those of a difference of
    `margin` or more and of −`margin` or less (Schuirmann 1987)."""
    negated = -np.asarray(differences, dtype=np.float64)
    return max(_one_sided(differences, margin), _one_sided(negated, margin))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values of a family, adjusted by Holm's step-down rule (1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def power(difference: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """Return the probability that n pairs with this true difference give p < α."""
    special = _special()
    if sd == 0:
        return float(difference != 0)
    bound, shift = special.stdtrit(n - 1, 1 - alpha / 2), abs(difference) * math.sqrt(n) / sd
    below = special.nctdtr(n - 1, shift, [bound, -bound])
    return float(1 - below[0] + below[1])


def detectable(sd: float, n: int, wanted: float = POWER, alpha: float = ALPHA) -> float:
    """Return the smallest true difference that n pairs see with that power."""
    if sd == 0:
        return 0.0
    low, high = 0.0, sd
    while power(high, sd, n, alpha) < wanted:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, sd, n, alpha) >= wanted else (middle, high)
    return high


def seeds_for(
    difference: float, sd: float, wanted: float = POWER, alpha: float = ALPHA, most: int = 10**12
) -> int:
    """Return the number of pairs that see a true difference with that power; `most` at most."""
    low, high = 1, 2
    while high < most and power(difference, sd, high, alpha) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(difference, sd, middle, alpha) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return min(high, most)


def crossed_bootstrap(
    arm_SN: np.ndarray,
    baseline_SN: np.ndarray,
    bytes_N: np.ndarray,
    *,
    draws: int = 10_000,
    alpha: float = ALPHA,
    seed: int = 0,
) -> Interval:
    """Return the interval of the difference in bits per byte where seeds and validation documents
    are both drawn anew, with replacement: documents are clusters, and both arms are read on the
    same ones. Drawing documents alone would ask how well one pair of models is known.

    Few seeds spread too little when they are drawn anew, by √((n−1)/n), and percentiles of a few
    values are no quantiles; so the deviation of the draws is taken, with that of the seeds widened,
    times Student's t with n − 1 degrees of freedom.

    Args:
        arm_SN, baseline_SN: nats of S ≥ 2 seeds and N documents.
        bytes_N: bytes of the documents."""
    S, N = arm_SN.shape
    assert S >= 2 and baseline_SN.shape == (S, N), "pairs of at least two seeds"
    difference_SN = (arm_SN - baseline_SN) / math.log(2)
    generator = np.random.default_rng(seed)
    widen = math.sqrt(S / (S - 1))
    values: list[np.ndarray] = []
    for at in range(0, draws, 1000):
        n = min(1000, draws - at)
        seeds_BS = _counts(generator, n, S) / S
        documents_BN = _counts(generator, n, N)
        seeds_BS = 1 / S + (seeds_BS - 1 / S) * widen
        bits_B = np.einsum("bn,bn->b", documents_BN, seeds_BS @ difference_SN)
        values.append(bits_B / (documents_BN @ bytes_N))
    mean = float(difference_SN.mean(0).sum() / bytes_N.sum())
    se = float(np.concatenate(values).std(ddof=1))
    half = float(_special().stdtrit(S - 1, 1 - alpha / 2)) * se
    return Interval(mean - half, mean + half)


def _counts(generator: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """Return how often each of n is drawn in n draws with replacement, float64 [draws, n]."""
    drawn = generator.integers(0, n, (draws, n)) + np.arange(draws)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)


@dataclass(frozen=True)
class Verdict:
    """The answer to one claim of a family."""

    answer: Answer
    estimate: float
    """The mean difference; NaN where there are less than two pairs."""
    ci: Interval | None
    """At the level that Holm's rule leaves to this claim."""
    alpha_adjusted: float


def verdicts(
    family: Sequence[tuple[Sequence[float] | np.ndarray, Region, float]], alpha: float = ALPHA
) -> list[Verdict]:
    """Judge claims (paired differences, region, margin) together: `holds` where the whole interval
    lies in the region, `refuted` where it lies wholly outside, else `cannot_tell`. Intervals have
    the levels of Holm's rule, α over the number of claims that are left. An `ordered` claim has a
    row of differences per step [C, N], and holds where all do: estimate and interval are those of
    the largest. Less than two pairs settle nothing: `cannot_tell`, without an interval."""
    judged = [np.atleast_2d(np.asarray(x, dtype=np.float64)) for x, _, _ in family]
    inside, outside = [], []
    for x_CN, (_, region, margin) in zip(judged, family, strict=True):
        enough = x_CN.shape[1] > 1
        inside.append(_settling(x_CN, region, margin, within=True) if enough else 1.0)
        outside.append(_settling(x_CN, region, margin, within=False) if enough else 1.0)
    holds, refuted = _levels(inside, alpha), _levels(outside, alpha)
    answers: list[Verdict] = []
    for i, x_CN in enumerate(judged):
        if x_CN.shape[1] < 2:
            answers.append(Verdict("cannot_tell", math.nan, None, holds[i]))
            continue
        answer: Answer = "cannot_tell"
        level = holds[i]
        if inside[i] <= level:
            answer = "holds"
        elif outside[i] <= refuted[i]:
            answer, level = "refuted", refuted[i]
        x_N = x_CN[x_CN.mean(1).argmax()]
        answers.append(Verdict(answer, float(x_N.mean()), t_interval(x_N, level), level))
    return answers


def _levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """Return the level at which each of a family is judged; those after the first that fails are
    judged at its level, which they fail too."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    levels, failed = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        levels[i] = failed or alpha / (len(order) - rank)
        if p_values[i] > levels[i]:
            failed = levels[i]
    return levels


def _settling(x_CN: np.ndarray, region: Region, margin: float, within: bool) -> float:
    """Return the smallest α at which the whole interval lies within a region, or wholly outside."""
    x_N = x_CN[0]
    match region, within:
        case "better" | "ordered", True:
            tails = [_one_sided(row_N, -margin) for row_N in x_CN]
        case "better" | "ordered", False:  # one row that is not is enough, of C looks
            return min(1.0, 2 * len(x_CN) * min(_one_sided(-row_N, margin) for row_N in x_CN))
        case "not_worse", True:
            tails = [_one_sided(x_N, margin)]
        case "not_worse", False:
            tails = [_one_sided(-x_N, -margin)]
        case "slope", True:
            tails = [_one_sided(-x_N, -margin)]
        case "slope", False:
            tails = [_one_sided(x_N, margin)]
        case _, True:
            tails = [_one_sided(x_N, margin), _one_sided(-x_N, margin)]
        case _:  # the whole interval on one side of both bounds
            return min(1.0, 2 * min(_one_sided(x_N, -margin), _one_sided(-x_N, -margin)))
    return min(1.0, 2 * max(tails))


def _one_sided(differences: Sequence[float] | np.ndarray, bound: float) -> float:
    """Return the p of a mean difference of `bound` or more."""
    n, mean, se = _summary(differences)
    if se == 0:
        return float(mean >= bound)
    return float(_special().stdtr(n - 1, (mean - bound) / se))


def _summary(differences: Sequence[float] | np.ndarray) -> tuple[int, float, float]:
    """Return n, mean and its standard error."""
    x_N = np.asarray(differences, dtype=np.float64)
    assert len(x_N) >= 2, "one seed has no interval"
    return len(x_N), float(x_N.mean()), float(x_N.std(ddof=1) / math.sqrt(len(x_N)))


def _special() -> Any:
    """Return `scipy.special`, which is imported in a quarter of the time of `scipy.stats`. Raises
    UsageError where SciPy is not installed."""
    try:
        import scipy.special
    except ImportError:
        raise UsageError(
            "comparisons need SciPy, which is not installed; pip install 'headway[lab]'"
        ) from None
    return scipy.special
