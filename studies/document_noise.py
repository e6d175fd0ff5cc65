"""How much of the noise of a paired difference do the validation documents make, beside the seeds?

Runs of `noise_floor`, two heads of 64 beside flat MoE, are read anew: the loss of each validation
document is in their folders, `runs/studies`. The error over documents is that of a ratio of sums,
documents drawn anew and the pair fixed; what a text of another kind would do is not in it."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from headway.config import UsageError
from headway.lab.experiment import PlannedArm
from headway.lab.measurement import Measurement, Row, Verdict
from studies.arms import series
from studies.noise_floor import BUDGETS, SEEDS, pair

ROOT = Path(__file__).resolve().parents[1] / "runs" / "studies"


def error_over_documents(difference_N: np.ndarray, bytes_N: np.ndarray) -> float:
    """Return the standard error of Σ difference / Σ bytes over documents that are drawn anew.

    Args:
        difference_N: bits of the arm minus those of the baseline, of each document."""
    N = len(bytes_N)
    ratio = difference_N.sum() / bytes_N.sum()
    residual_N = difference_N - ratio * bytes_N
    return float(np.sqrt(N / (N - 1) * (residual_N**2).sum()) / bytes_N.sum())


def measure() -> list[Row]:
    """Return a row per budget. Raises UsageError where a run is missing."""
    planned = series("screen", "python", pair("python"), SEEDS, BUDGETS).plan(lambda _: None)
    rows: list[Row] = []
    for steps in BUDGETS:
        bits_SN, bytes_N = differences(planned["2x64"][steps], planned["flat"][steps])
        bits_S = bits_SN.sum(1) / bytes_N.sum()
        one_pair = mean(error_over_documents(bits_N, bytes_N) for bits_N in bits_SN)
        rows.append(
            {
                "steps": steps,
                "seeds": len(bits_S),
                "documents": len(bytes_N),
                "mean difference": float(bits_S.mean()),
                "sd over seeds": stdev(bits_S.tolist()),
                "error over documents, one pair": one_pair,
                "error over documents, all pairs": error_over_documents(bits_SN.mean(0), bytes_N),
                "documents / seeds": one_pair / stdev(bits_S.tolist()),
            }
        )
    return rows


def differences(arm: PlannedArm, baseline: PlannedArm) -> tuple[np.ndarray, np.ndarray]:
    """Return arm minus baseline of each seed and validation document, in bits [S, N], and the bytes
    of the documents [N]."""
    pairs = [[losses(planned.run(seed).key) for planned in (arm, baseline)] for seed in SEEDS]
    hash_N, _, bytes_N = pairs[0][0]
    if any(not np.array_equal(run[0], hash_N) for both in pairs for run in both):
        raise UsageError(f"runs in {ROOT} were validated on other documents")
    bits_SN = np.stack([(ours[1] - theirs[1]) / np.log(2) for ours, theirs in pairs])
    return bits_SN, bytes_N


def losses(key: str) -> list[np.ndarray]:
    """Return hash, nats and bytes of the documents of a run, which all versions of the file have.
    Raises UsageError where the run is missing."""
    path = ROOT / "runs" / key / "documents.npz"
    if not path.is_file():
        raise UsageError(f"{path} is missing; headway study noise_floor --run trains it")
    with np.load(path) as arrays:
        return [arrays[name] for name in ("hash_N", "nats_N", "bytes_N")]


def judge(rows: Sequence[Row]) -> Verdict:
    shares = {row["steps"]: row["documents / seeds"] for row in rows}
    answer = "cannot_tell"
    if max(shares.values()) <= 0.5:
        answer = "holds"
    elif max(shares.values()) > 1:
        answer = "refuted"
    said = ", ".join(f"{share:.2f} at {steps}" for steps, share in shares.items())
    return Verdict(
        answer, f"The error over documents is so many times the deviation: {said} steps."
    )


STUDY = Measurement(
    "document_noise",
    "Seeds, and not validation documents, make the noise of a paired difference: an interval over "
    "the documents of one pair is far too short.",
    "Holds if the error over documents of one pair is at most half of the deviation over seeds at "
    "250, 500 and 1,000 steps; refuted if it is larger than the deviation at any.",
    measure,
    judge,
)
