"""How a law of the lower rungs predicts the top ones."""

from typing import Any, NamedTuple

import numpy as np

from headway.config import UsageError
from headway.lab import laws
from headway.lab.isoflop import Minima, minima
from headway.lab.laws import Columns, Irreducible
from headway.lab.rungs import Runs

BOOTSTRAPS = 300


class Backtest(NamedTuple):
    """Runs of the top rungs beside what a law of the others says of them."""

    dropped_rungs: int
    runs: int
    mean_error: float
    """Of predicted / measured − 1."""
    largest_error: float
    inside: int
    """Runs in their interval."""
    predicted: list[float]
    measured: list[float]


def backtested(
    runs: Runs, irreducible: Irreducible, level: float, notes: list[str], **options: Any
) -> tuple[Backtest, ...]:
    """Return how the lower rungs predict the top one, and the top two; where they give no law, add
    a sentence to `notes`. `options` are those of `laws.fit`."""
    rows = []
    for dropped in (1, 2):
        below = runs.where(runs.rung_N >= dropped)
        try:
            x, loss_N, _ = law_data(below)
            law = laws.fit(runs.form, x, loss_N, irreducible, bootstraps=BOOTSTRAPS, **options)
        except UsageError as error:
            notes.append(f"no back-test without the top {dropped} rungs: {error}")
            continue
        x, measured_N, _ = law_data(runs.where(runs.rung_N < dropped))
        predicted_N = law.loss(x)
        low_N, high_N = (np.array(v) for v in interval(law.draws(x), level))
        error_N = predicted_N / measured_N - 1
        inside_N = (low_N <= measured_N) & (measured_N <= high_N)
        row = Backtest(
            dropped_rungs=dropped,
            runs=len(error_N),
            mean_error=float(error_N.mean()),
            largest_error=float(error_N[np.argmax(np.abs(error_N))]),
            inside=int(inside_N.sum()),
            predicted=numbers(predicted_N),
            measured=numbers(measured_N),
        )
        rows.append(row)
    return tuple(rows)


def law_data(runs: Runs) -> tuple[Columns, np.ndarray, Minima | None]:
    """Return what the law is fitted to: the runs, or of isoflop curves their minima."""
    if runs.form != "isoflop":
        return runs.x, runs.loss_N, None
    vertices = minima(runs.x["flops"], runs.x["tokens"], runs.loss_N)
    return {"flops": vertices.budget_B}, vertices.loss_B, vertices


def interval(draws_R: np.ndarray, level: float) -> Any:
    """Return the quantiles of draws that leave (1 − level)/2 on both sides, over the first dim."""
    tail = (1 - level) / 2
    return np.quantile(draws_R, [tail, 1 - tail], axis=0).tolist()


def numbers(values: np.ndarray) -> list[float]:
    """Return floats with nine digits: a fit stays a small file."""
    return [float(f"{value:.9g}") for value in values]
