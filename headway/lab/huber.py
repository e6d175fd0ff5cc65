"""Huber regression of log losses, many fits at once.

A law is a sum of exponentials, log L_n = log Σ_j exp(X_jn · θ), as Hoffmann et al. 2022 (D.2) fit
it. R fits (starts, or replicates of a bootstrap) share the design and are solved together by
Levenberg–Marquardt with Huber's weights; one that has converged leaves the batch.

R fits · N runs · J terms · P parameters."""

from typing import NamedTuple

import numpy as np

ITERATIONS = 300
TOLERANCE = 1e-8
"""Relative gain of the objective below which a step counts as the last."""


class Solution(NamedTuple):
    """Where the fits ended."""

    theta_RP: np.ndarray
    objective_R: np.ndarray
    """Mean Huber loss of the log residuals."""


def log_law(X_JNP: np.ndarray, theta_RP: np.ndarray, log_floor_R1: np.ndarray) -> np.ndarray:
    """Return log(exp(log_floor) + Σ_j exp(X_j θ)), float64 [R, N]. A floor of −inf is none."""
    return _terms(X_JNP, theta_RP, log_floor_R1)[0]


def solve(
    X_JNP: np.ndarray,
    log_loss_RN: np.ndarray,
    start_RP: np.ndarray,
    log_floor_R1: np.ndarray,
    delta: float,
) -> Solution:
    """Return the parameters that minimise the Huber loss of log law − log loss from each start.

    Args:
        X_JNP: the terms of the law at each run.
        log_loss_RN: natural logarithms of the losses, of each fit.
        log_floor_R1: logarithm of a loss that is added and not fitted; −inf for none.
        delta: where squares turn into absolute values, in log space."""
    theta_RP, damping_R = start_RP.copy(), np.full(len(start_RP), 1e-3)
    objective_R = np.full(len(start_RP), np.inf)
    active = np.arange(len(start_RP))
    eye = np.eye(start_RP.shape[1])
    values, share = _terms(X_JNP, theta_RP, log_floor_R1)
    residual = values - log_loss_RN
    objective_R[:] = _huber(residual, delta)
    for _ in range(ITERATIONS):
        floor, target = log_floor_R1[active], log_loss_RN[active]
        jacobian = np.einsum("rjn,jnp->rnp", share, X_JNP, optimize=True)
        weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        weighted = jacobian * weight[:, :, None]
        normal = weighted.transpose(0, 2, 1) @ jacobian
        gradient = (weighted * residual[:, :, None]).sum(1)
        diagonal = np.einsum("rpp->rp", normal)
        ridge = damping_R[active, None] * diagonal + 1e-12 * diagonal.max(1, keepdims=True)
        damped = normal + ridge[:, :, None] * eye
        step = -np.linalg.solve(damped, gradient[:, :, None])[:, :, 0]
        step = np.clip(step, -3.0, 3.0)
        trial = theta_RP[active] + step
        trial_values, trial_share = _terms(X_JNP, trial, floor)
        trial_residual = trial_values - target
        trial_objective = _huber(trial_residual, delta)
        before = objective_R[active]
        better = trial_objective <= before
        done = better & (before - trial_objective <= TOLERANCE * before)
        done |= ~better & (damping_R[active] > 1e8)
        theta_RP[active] = np.where(better[:, None], trial, theta_RP[active])
        objective_R[active] = np.where(better, trial_objective, before)
        damping_R[active] *= np.where(better, 0.2, 6.0)
        residual = np.where(better[:, None], trial_residual, residual)
        share = np.where(better[:, None, None], trial_share, share)
        active, residual, share = active[~done], residual[~done], share[~done]
        if not len(active):
            break
    return Solution(theta_RP, objective_R)


def _terms(
    X_JNP: np.ndarray, theta_RP: np.ndarray, log_floor_R1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithm of the law [R, N], and the share of each term in it [R, J, N]."""
    J, N, P = X_JNP.shape
    exponent = (theta_RP @ X_JNP.reshape(J * N, P).T).reshape(-1, J, N)
    top = np.maximum(exponent.max(1), log_floor_R1)
    parts = np.exp(exponent - top[:, None])
    total = parts.sum(1) + np.exp(log_floor_R1 - top)
    return top + np.log(total), parts / total[:, None]


def _huber(residual_RN: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residual_RN)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).mean(1)
