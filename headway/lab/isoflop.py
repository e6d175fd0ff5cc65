"""IsoFLOP curves: at each budget of compute, the number of tokens with the least loss (Hoffmann et
al. 2022, approach 2)."""

from typing import NamedTuple

import numpy as np

from headway.config import UsageError


class Minima(NamedTuple):
    """The minimum at each of B budgets, from the smallest."""

    budget_B: np.ndarray
    """FLOPs."""
    tokens_B: np.ndarray
    loss_B: np.ndarray
    parabola_B3: np.ndarray
    """Loss at the budget = a·x² + b·x + c, x = ln tokens."""
    seed_noise: float
    """Standard deviation of a run about its parabola, nats; 0 where all have three runs."""


def minima(budget_N: np.ndarray, tokens_N: np.ndarray, loss_N: np.ndarray) -> Minima:
    """Return the vertex of a parabola in log tokens through the runs of each budget. Raises
    UsageError for a budget that has no minimum between its runs."""
    rows, squares, freedom = [], 0.0, 0
    for budget in np.unique(budget_N):
        at = budget_N == budget
        x_N, y_N = np.log(tokens_N[at]), loss_N[at]
        name = f"budget {budget:g}"
        if len(np.unique(x_N)) < 3:
            raise UsageError(f"{name} has {len(np.unique(x_N))} numbers of tokens; it needs 3")
        middle = x_N.mean()
        a, b, c = np.polyfit(x_N - middle, y_N, 2)
        if a <= 0:
            raise UsageError(f"{name}: its losses have a maximum over tokens, no minimum; add runs")
        vertex = -b / (2 * a) + middle
        if not x_N.min() < vertex < x_N.max():
            side = "fewer" if vertex <= x_N.min() else "more"
            raise UsageError(
                f"{name}: its least loss lies at {np.exp(vertex):.3g} tokens, outside its runs; "
                f"add runs with {side} tokens"
            )
        squares += float(((np.polyval((a, b, c), x_N - middle) - y_N) ** 2).sum())
        freedom += len(x_N) - 3
        parabola = (a, b - 2 * a * middle, c - b * middle + a * middle**2)
        rows.append((budget, np.exp(vertex), c - b**2 / (4 * a), *parabola))
    table = np.array(rows)
    noise = float(np.sqrt(squares / freedom)) if freedom else 0.0
    return Minima(table[:, 0], table[:, 1], table[:, 2], table[:, 3:], noise)
