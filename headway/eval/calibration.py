"""Whether a model's probabilities are as often right as they say: reliability by bins of confidence
and the expected calibration error (Guo et al. 2017, arXiv 1706.04599)."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

BINS = 10
"""Of equal width, over confidences from 0 to 1."""


class Calibration(NamedTuple):
    """Predictions by the probability that they were made with; what several have adds up."""

    sums_3B: np.ndarray
    """float64 `[3, BINS]`: predictions, Σ of their probabilities, how many were right."""

    @classmethod
    def of(cls, confidence_N: np.ndarray, right_N: np.ndarray) -> "Calibration":
        """Return the bins of predictions: their probabilities, and whether each was right."""
        # float32 softmax may give a little more than 1; NaN, of a model that diverged, is in the
        # first bin, whose sum and error it makes NaN
        bin_N = np.minimum((np.nan_to_num(confidence_N) * BINS).astype(np.int64), BINS - 1)
        weights = (None, confidence_N, right_N)
        return cls(np.stack([np.bincount(bin_N, w, BINS).astype(np.float64) for w in weights]))

    @property
    def error(self) -> float:
        """The expected calibration error: Σ over bins of their share of all predictions times how
        far mean probability and share of right ones differ; 0 is calibrated."""
        n_B, confidence_B, right_B = self.sums_3B
        return float(np.abs(confidence_B - right_B).sum() / n_B.sum())

    def bins(self) -> list[dict[str, float]]:
        """Return the bins that have predictions: `n`, mean `confidence`, share `right`."""
        return [
            {"n": int(n), "confidence": float(confidence / n), "right": float(right / n)}
            for n, confidence, right in self.sums_3B.T
            if n
        ]

    @property
    def sentence(self) -> str:
        """Return it for people."""
        rows = ", ".join(f"{row['confidence']:.0%} → {row['right']:.0%}" for row in self.bins())
        return f"calibration error {self.error:.4f}; probability → share right: {rows}"


def of_next_tokens(log_probs_BS: Tensor, best_BS: Tensor, targets_BS: Tensor) -> Calibration:
    """Return the calibration of the likeliest next tokens, from log p of the targets (−1 is none)
    and of the likeliest (`Output.best_log_probs_BS`)."""
    asked = (targets_BS >= 0).cpu().numpy()
    right_N = (best_BS == log_probs_BS).cpu().numpy()[asked]
    return Calibration.of(best_BS.double().exp().cpu().numpy()[asked], right_N)
