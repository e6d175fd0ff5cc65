"""Multiple choice by log-probabilities: three ways to compare choices of different lengths, and
whether the probabilities mean what they say."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from headway.eval.calibration import Calibration


class Question(NamedTuple):
    """One question with C choices."""

    log_probs_C: np.ndarray
    """float64, Σ log p of the tokens of each choice, in nats."""
    n_bytes_C: np.ndarray
    """float64, bytes of what was scored of each, blanks in front included."""
    n_tokens_C: np.ndarray
    """float64, its tokens."""
    right: frozenset[int]
    """The choices that are right, one or more."""


def multiple_choice(questions: Sequence[Question]) -> dict[str, Any]:
    """Return `accuracy` of the likeliest choice, `accuracy_per_byte` and `accuracy_per_token` of
    the one with the largest log-probability per byte or token, `questions`, their number, and
    `calibration_error` with the bins of `calibration`, of the shares of the choices in the sum of
    their probabilities. Of equal choices the first one counts."""
    weights = {
        "accuracy": [np.ones_like(q.log_probs_C) for q in questions],
        "accuracy_per_byte": [q.n_bytes_C for q in questions],
        "accuracy_per_token": [q.n_tokens_C for q in questions],
    }
    answer: dict[str, Any] = {}
    for name, sizes in weights.items():
        chosen = [int((q.log_probs_C / n).argmax()) for q, n in zip(questions, sizes, strict=True)]
        right_N = np.array([c in q.right for c, q in zip(chosen, questions, strict=True)])
        answer[name] = float(right_N.mean())
    shares = [np.exp(q.log_probs_C - np.logaddexp.reduce(q.log_probs_C)) for q in questions]
    right_N = np.array([int(s.argmax()) in q.right for s, q in zip(shares, questions, strict=True)])
    calibration = Calibration.of(np.array([s.max() for s in shares]), right_N)
    return {
        **answer,
        "questions": len(questions),
        "calibration_error": calibration.error,
        "calibration": calibration.bins(),
    }
