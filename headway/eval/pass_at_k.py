"""Scores of several samples per problem: unbiased pass@k and Cover@τ, with intervals over problems.

A JSON line per problem: `{"problem": …, "correct": [0, 1, …]}`, an entry per sample; `texts` may
hold the samples themselves, of which some may be near-copies of each other."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headway.config import UsageError

DRAWS = 4000
"""Of the bootstrap."""
BLOCK = 1 << 22
"""Problems that are drawn at once."""


@dataclass(frozen=True)
class Samples:
    """How often each of P problems was tried and solved."""

    tries_P: np.ndarray
    """int64."""
    solved_P: np.ndarray
    """int64, at most `tries_P`."""
    texts: tuple[tuple[str, ...], ...] = ()
    """The samples of each problem; empty where the file has none."""


class Scored(NamedTuple):
    """A mean over problems, with its 95% interval."""

    value: float
    ci95: tuple[float, float]


def read_samples(path: Path) -> Samples:
    """Return the samples of a file. Lines with the same `problem` are added up. Raises UsageError
    for a line of another form."""
    counts: dict[str, list[int]] = {}
    texts: dict[str, list[str]] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}; give JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem, correct = row["problem"], list(row["correct"])
            samples = list(row.get("texts", ()))
        except (ValueError, KeyError, TypeError):
            problem, correct, samples = None, [], []
        if samples and len(samples) != len(correct):
            n = f"{len(samples)} texts and {len(correct)} marks in `correct`"
            raise UsageError(f"{path} line {number} has {n}; give as many")
        if not correct or any(mark not in (0, 1) for mark in correct):
            form = '{"problem": NAME, "correct": [0, 1, …]}'
            raise UsageError(f"{path} line {number} is not of the form {form}")
        key = json.dumps(problem, sort_keys=True)
        texts.setdefault(key, []).extend(map(str, samples))
        tries = counts.setdefault(key, [0, 0])
        tries[0] += len(correct)
        tries[1] += int(sum(correct))
    if not counts:
        raise UsageError(f"{path} has no problem; give a line per problem")
    tries_P, solved_P = np.array(list(counts.values()), dtype=np.int64).T
    whole = all(len(texts[key]) == tries for key, (tries, _) in counts.items())
    if not whole and any(texts.values()):
        raise UsageError(f"{path} has `texts` in some lines alone; give them in all or in none")
    return Samples(tries_P, solved_P, tuple(map(tuple, texts.values())) if whole else ())


def pass_at_k(samples: Samples, k: int) -> np.ndarray:
    """Return for each problem the unbiased estimate of the probability that one of k samples is
    right, 1 − C(n−c, k)/C(n, k), as a product (Chen et al. 2021), float64 [P]. Raises UsageError
    where a problem has fewer than k samples."""
    fewest = int(samples.tries_P.min())
    if not 1 <= k <= fewest:
        few = int((samples.tries_P < k).sum())
        why = f"{few} problems have fewer samples, one {fewest}" if k > fewest else "it is below 1"
        raise UsageError(f"--k {k} cannot be estimated: {why}; use 1 … {fewest}")
    pairs_U2, which_P = np.unique(
        np.stack([samples.tries_P, samples.solved_P], 1), axis=0, return_inverse=True
    )
    estimates = [
        1.0 if n - c < k else 1 - float(np.prod(1 - k / np.arange(n - c + 1, n + 1)))
        for n, c in pairs_U2
    ]
    return np.array(estimates)[which_P.ravel()]


def covered(samples: Samples, tau: float) -> np.ndarray:
    """Return for each problem whether at least a share τ of its samples is right (Cover@τ, arXiv
    2510.08325), float64 [P]: unlike pass@k it does not go to 1 by guessing. Raises UsageError for a
    τ that is no share."""
    if not 0 < tau <= 1:
        raise UsageError(f"--tau {tau:g} is no share of samples; use 0.1 or 0.5")
    return (samples.solved_P >= tau * samples.tries_P - 1e-9).astype(np.float64)


def near_repeats(samples: Samples) -> np.ndarray:
    """Return for each problem the share of its samples that have a near-copy among them, float64
    [P] (`eval.diversity.near_duplicate_rate`). Raises UsageError without datasketch."""
    from headway.eval.diversity import near_duplicate_rate

    return np.array([near_duplicate_rate(texts) for texts in samples.texts])


def over_problems(values_MP: Sequence[np.ndarray], seed: int = 0) -> list[Scored]:
    """Return the mean of each score over the problems; the intervals are percentiles of a bootstrap
    that draws the same problems for all."""
    scores_PM = np.stack(values_MP, 1)
    P = len(scores_PM)
    generator, means = np.random.default_rng(seed), []
    block = max(1, BLOCK // P)
    for first in range(0, DRAWS, block):
        n = min(block, DRAWS - first)
        drawn = generator.integers(0, P, (n, P)) + np.arange(n)[:, None] * P
        counts = np.bincount(drawn.ravel(), minlength=n * P).reshape(n, P)
        means.append(counts @ scores_PM / P)
    low_M, high_M = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    mean_M = scores_PM.mean(0)
    return [
        Scored(float(m), (float(low), float(high)))
        for m, low, high in zip(mean_M, low_M, high_M, strict=True)
    ]
