"""The batched solver against SciPy."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from headway.lab.huber import log_law, solve
from headway.lab.laws import design


def runs(noise=0.01, n=40, seed=0):
    rng = np.random.default_rng(seed)
    N, D = 10 ** rng.uniform(7, 9.5, n), 10 ** rng.uniform(9, 11.5, n)
    loss = 1.69 + 406.4 * N**-0.34 + 410.7 * D**-0.28
    return {"params": N, "tokens": D}, np.log(loss * np.exp(noise * rng.standard_normal(n)))


@pytest.mark.parametrize("delta", [1e-3, 1e-2, 1.0])
def test_the_minimum_is_that_of_scipy(delta):
    x, log_loss = runs()
    X_JNP = design("chinchilla", x, free=True).X_JNP
    start = np.array([6.0, 0.34, 6.0, 0.28, 0.5])
    none = np.full((1, 1), -np.inf)
    ours = solve(X_JNP, log_loss[None], start[None], none, delta)
    theirs = least_squares(
        lambda theta: log_law(X_JNP, theta[None], none)[0] - log_loss,
        start, loss="huber", f_scale=delta, x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=20_000,
    )  # fmt: skip
    objective = theirs.cost / len(log_loss)
    assert ours.objective_R[0] == pytest.approx(objective, rel=1e-6)
    x["tokens"] *= 100
    far = design("chinchilla", x, free=True).X_JNP
    predicted = [log_law(far, theta[None], none)[0] for theta in (ours.theta_RP[0], theirs.x)]
    np.testing.assert_allclose(*predicted, atol=2e-4)


def test_a_batch_gives_what_its_fits_give_alone():
    x, log_loss = runs()
    X_JNP = design("chinchilla", x, free=False).X_JNP
    rng = np.random.default_rng(1)
    targets = log_loss + 0.01 * rng.standard_normal((5, len(log_loss)))
    starts = np.array([5.0, 0.3, 5.0, 0.3]) + 0.05 * rng.standard_normal((5, 4))
    floors = np.log(np.linspace(1.4, 1.7, 5))[:, None]
    together = solve(X_JNP, targets, starts, floors, 1e-2)
    for i in range(5):
        part = slice(i, i + 1)
        alone = solve(X_JNP, targets[part], starts[part], floors[part], 1e-2)
        assert alone.objective_R[0] == pytest.approx(together.objective_R[i], rel=1e-6)


def test_an_outlier_moves_a_huber_fit_less():
    x, log_loss = runs(noise=1e-4)
    log_loss[3] += 0.5
    X_JNP = design("chinchilla", x, free=False).X_JNP
    start, floor = np.array([[6.0, 0.34, 6.0, 0.28]]), np.full((1, 1), np.log(1.69))
    robust, squares = (solve(X_JNP, log_loss[None], start, floor, d) for d in (1e-3, 10.0))
    assert abs(robust.theta_RP[0, 1] - 0.34) < 2e-3 < abs(squares.theta_RP[0, 1] - 0.34)
