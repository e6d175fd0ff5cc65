"""Scaling laws: the loss as a function of compute, parameters, tokens and the shape of experts.

    power         Kaplan et al. 2020
    isoflop       the same, of the minimum over tokens at each budget (`lab.isoflop`)
    chinchilla    Hoffmann et al. 2022
    granularity   Krajewski et al. 2024
    joint         Ludziejewski et al. 2025; E as given, 1 for a dense model

Logarithms of losses are fitted with Huber's loss from many starts (`lab.huber`). Intervals are
those of a bootstrap: in each replicate every run gets the residual of a run drawn anew, with either
sign, and the law is fitted again; one residual more is added for the run that is predicted. Where
the irreducible loss is stated with an uncertainty, each replicate has its own. Residuals are
widened by √(n/ν) and, in each replicate, by √(ν/χ²), ν = n − parameters, which gives Student's t
where a law is a line.

C FLOPs · N parameters (active) · D tokens · G d_ff over the width of an expert · E experts."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from headway.config import UsageError
from headway.lab.huber import log_law, solve

Form = Literal["power", "isoflop", "chinchilla", "granularity", "joint"]
BOOTSTRAPS = 1000
LEVEL = 0.9
Columns = Mapping[str, np.ndarray]
"""Name of a column → a value per run."""


EQUATION: dict[Form, str] = {
    "power": "L = L∞ + A·C^−alpha",
    "isoflop": "L = L∞ + A·C^−alpha at the best number of tokens",
    "chinchilla": "L = L∞ + A·N^−alpha + B·D^−beta",
    "granularity": "L = L∞ + (g·G^−gamma + a)·N^−alpha + b·D^−beta",
    "joint": "L = L∞ + a·E^delta·N^−(alpha + gamma·ln E) + b·E^omega·D^−(beta + zeta·ln E)",
}


class Irreducible(NamedTuple):
    """What is known of the loss that no compute removes."""

    value: float | None
    """Nats; None: it is fitted."""
    sd: float = 0.0
    """Its standard uncertainty."""

    @classmethod
    def parse(cls, text: str) -> "Irreducible":
        """Parse `free`, `X` or `X±Y` (or `X+-Y`)."""
        if text == "free":
            return cls(None)
        value, _, sd = text.replace("+-", "±").partition("±")
        try:
            parsed = cls(float(value), float(sd or 0))
        except ValueError:
            parsed = cls(-1.0)
        if not (0 <= (parsed.value or 0) < math.inf and 0 <= parsed.sd < math.inf):
            raise UsageError(
                f"--irreducible {text} is neither free nor X nor X±Y; use 1.6 or 1.6±0.2"
            )
        return parsed

    def __str__(self) -> str:
        if self.value is None:
            return "free"
        return f"{self.value:g}±{self.sd:g}" if self.sd else f"{self.value:g}"


def inputs(form: Form) -> tuple[str, ...]:
    """Return the columns that a law reads."""
    match form:
        case "power" | "isoflop":
            return ("flops",)
        case "chinchilla":
            return ("params", "tokens")
        case "granularity":
            return ("params", "tokens", "granularity")
        case "joint":
            return ("params", "tokens", "experts")


def _terms(form: Form, x: Columns) -> list[dict[str, Any]]:
    """Return the terms of a law as exponents: parameter → factor. The first of a term is the
    logarithm of its amplitude."""
    ln = {name: np.log(x[name]) for name in inputs(form)}
    match form:
        case "power" | "isoflop":
            return [{"A": 1, "alpha": -ln["flops"]}]
        case "chinchilla":
            return [{"A": 1, "alpha": -ln["params"]}, {"B": 1, "beta": -ln["tokens"]}]
        case "granularity":
            N, D, G = ln["params"], ln["tokens"], ln["granularity"]
            return [{"g": 1, "gamma": -G, "alpha": -N}, {"a": 1, "alpha": -N}, {"b": 1, "beta": -D}]
        case "joint":
            N, D, E = ln["params"], ln["tokens"], ln["experts"]
            return [
                {"a": 1, "delta": E, "alpha": -N, "gamma": -E * N},
                {"b": 1, "omega": E, "beta": -D, "zeta": -E * D},
            ]


def _starts(form: Form) -> dict[str, tuple[float, ...]]:
    """Return where exponents start; those that are left out start at 0."""
    decays = (0.05, 0.12, 0.25, 0.5)
    match form:
        case "power" | "isoflop":
            return {"alpha": decays}
        case "chinchilla":
            return {"alpha": decays, "beta": decays}
        case "granularity":
            return {"gamma": (0.3, 1.0), "alpha": decays, "beta": decays}
        case "joint":
            return {"alpha": decays, "beta": decays, "omega": (0.0, -0.5)}


class Design(NamedTuple):
    """A law at some runs, ready for the solver."""

    names: tuple[str, ...]
    amplitudes: tuple[str, ...]
    X_JNP: np.ndarray


def design(form: Form, x: Columns, free: bool) -> Design:
    """Return the terms at each run; a free irreducible loss is one more, `irreducible`."""
    terms = _terms(form, x) + ([{"irreducible": 1}] if free else [])
    names = tuple(dict.fromkeys(name for term in terms for name in term))
    N = len(x[inputs(form)[0]])
    X_JNP = np.zeros((len(terms), N, len(names)))
    for j, term in enumerate(terms):
        for name, factor in term.items():
            X_JNP[j, :, names.index(name)] = factor
    return Design(names, tuple(next(iter(term)) for term in terms), X_JNP)


@dataclass(frozen=True)
class Law:
    """A fitted law, with its replicates."""

    form: Form
    irreducible: Irreducible
    theta_P: np.ndarray
    """Parameters in the order of `design`; amplitudes as logarithms."""
    theta_RP: np.ndarray
    """Those of the replicates."""
    log_floor_R: np.ndarray
    """Logarithm of their irreducible loss where it is not fitted; else −inf."""
    noise_R: np.ndarray
    """What one run more deviates, in log space."""
    residual_N: np.ndarray
    """log loss − log law at the runs."""

    def loss(self, x: Columns) -> np.ndarray:
        """Return the predicted losses [N]."""
        floor = self.irreducible.value
        return np.exp(_evaluate(self, x, self.theta_P[None], np.array([_log(floor)])))[0]

    def draws(self, x: Columns, noise: bool = True) -> np.ndarray:
        """Return predictions of the replicates [R, N]: of a run, or without noise of its mean."""
        values_RN = _evaluate(self, x, self.theta_RP, self.log_floor_R)
        return np.exp(values_RN + self.noise_R[:, None] if noise else values_RN)

    def parameters(self) -> dict[str, float]:
        """Return the parameters as the equations have them."""
        floor = np.array([_log(self.irreducible.value)])
        published = self._published(self.theta_P[None], floor)
        return {name: float(v[0]) for name, v in published.items()}

    def parameter_draws(self) -> dict[str, np.ndarray]:
        """Return those of the replicates, [R] each."""
        return self._published(self.theta_RP, self.log_floor_R)

    def _published(self, theta_RP: np.ndarray, log_floor_R: np.ndarray) -> dict[str, np.ndarray]:
        one = {name: np.ones(1) for name in inputs(self.form)}
        names, amplitudes, _ = design(self.form, one, self.irreducible.value is None)
        values = {name: theta_RP[:, i] for i, name in enumerate(names)}
        published = {k: np.exp(v) if k in amplitudes else v for k, v in values.items()}
        if self.irreducible.value is not None:
            published["irreducible"] = np.exp(log_floor_R)
        return published


def _evaluate(law: Law, x: Columns, theta_RP: np.ndarray, log_floor_R: np.ndarray) -> np.ndarray:
    X_JNP = design(law.form, x, law.irreducible.value is None).X_JNP
    return log_law(X_JNP, theta_RP, log_floor_R[:, None])


def _log(value: float | None) -> float:
    return math.log(value) if value else -math.inf


def fit(
    form: Form,
    x: Columns,
    loss_N: np.ndarray,
    irreducible: Irreducible,
    *,
    bootstraps: int = BOOTSTRAPS,
    delta: float = 1e-3,
    seed: int = 0,
    falling: bool = True,
) -> Law:
    """Return the law of these runs.

    Args:
        x: a value per run of each of `inputs(form)`, above 0.
        loss_N: nats.
        delta: of Huber's loss, in log space; 1e-3 in Hoffmann et al. 2022.
        falling: whether a law that does not fall is an error.
    Raises: UsageError where the runs do not determine a law."""
    free = irreducible.value is None
    names, _, X_JNP = design(form, x, free)
    _check(form, x, loss_N, irreducible, len(names))
    log_loss_N, floor = np.log(loss_N), _log(irreducible.value)
    starts_RP = _start_points(form, x, loss_N, irreducible)
    R = len(starts_RP)
    target_RN = np.broadcast_to(log_loss_N, (R, len(loss_N)))
    solution = solve(X_JNP, target_RN, starts_RP, np.full((R, 1), floor), delta)
    theta_P = solution.theta_RP[np.nanargmin(solution.objective_R)]
    fitted_N = log_law(X_JNP, theta_P[None], np.array([[floor]]))[0]
    residual_N = log_loss_N - fitted_N

    n, dof = len(loss_N), len(loss_N) - len(names)
    generator = np.random.default_rng(seed)
    scale_R1 = np.sqrt(n / generator.chisquare(dof, (bootstraps, 1)))
    drawn_RN = scale_R1 * residual_N[generator.integers(0, n, (bootstraps, n + 1))]
    drawn_RN *= generator.choice((-1.0, 1.0), drawn_RN.shape)
    floor_R = np.full(bootstraps, floor)
    if irreducible.sd:
        floor_R = np.log(_floors(generator, irreducible, float(loss_N.min()), bootstraps))
    replicates = solve(
        X_JNP,
        fitted_N + drawn_RN[:, :n],
        np.broadcast_to(theta_P, (bootstraps, len(theta_P))),
        floor_R[:, None],
        delta,
    )
    noise_R = drawn_RN[:, n]
    law = Law(form, irreducible, theta_P, replicates.theta_RP, floor_R, noise_R, residual_N)
    if falling:
        _check_falls(law, x)
    return law


def _floors(
    generator: np.random.Generator, irreducible: Irreducible, least: float, n: int
) -> np.ndarray:
    """Return draws of the irreducible loss, between 0 and the least loss."""
    values = np.empty(0)
    while len(values) < n:
        drawn = generator.normal(irreducible.value or 0.0, irreducible.sd, 4 * n)
        values = np.append(values, drawn[(drawn > 0) & (drawn < least)])
    return values[:n]


def _start_points(
    form: Form, x: Columns, loss_N: np.ndarray, irreducible: Irreducible
) -> np.ndarray:
    """Return starts [R, P]: exponents and the irreducible loss from a grid, and amplitudes such
    that the terms share the rest of the mean loss."""
    free = irreducible.value is None
    names, amplitudes, X_JNP = design(form, x, free)
    grid = _starts(form)
    shares = (0.2, 0.5, 0.75, 0.92) if free else (1.0,)
    mean_JP = X_JNP.mean(1)
    starts = []
    for exponents in itertools.product(*grid.values()):
        for share in shares:
            start = dict.fromkeys(names, 0.0) | dict(zip(grid, exponents, strict=True))
            floor = share * float(loss_N.min()) if free else float(irreducible.value or 0)
            start |= {"irreducible": math.log(floor)} if free else {}
            rest = math.log((float(loss_N.mean()) - floor) / (len(amplitudes) - free))
            theta = np.array([start[name] for name in names])
            for j, name in enumerate(amplitudes[: len(amplitudes) - free]):
                theta[names.index(name)] = rest - mean_JP[j] @ theta
            starts.append(theta)
    return np.stack(starts)


def _check(
    form: Form, x: Columns, loss_N: np.ndarray, irreducible: Irreducible, n_parameters: int
) -> None:
    """Raise UsageError where runs cannot determine a law."""
    names = inputs(form)
    points = np.log(np.stack([x[name] for name in names], 1))
    distinct, n = len(np.unique(points, axis=0)), len(loss_N)
    if n <= n_parameters or distinct < n_parameters:
        what = "free" if irreducible.value is None else "pinned"
        raise UsageError(
            f"a law of form {form} with a {what} irreducible loss has {n_parameters} parameters "
            f"and needs {n_parameters + 1} rungs or more; there are {distinct} in {n} runs"
        )
    centred = (points - points.mean(0)) / np.maximum(points.std(0), 1e-12)
    if np.linalg.matrix_rank(centred, tol=1e-3 * math.sqrt(n)) < len(names):
        raise UsageError(
            f"{' and '.join(names)} must vary, and independently of each other, for a law of form "
            f"{form}; add runs, or use --form power"
        )
    if (irreducible.value or 0) >= loss_N.min():
        raise UsageError(
            f"the irreducible loss {irreducible} is not below the least loss, {loss_N.min():g}; "
            "use a smaller one or --irreducible free"
        )


def _check_falls(law: Law, x: Columns) -> None:
    """Raise UsageError where more compute does not lower the loss."""
    middle = {name: np.exp(np.log(x[name]).mean(keepdims=True)) for name in inputs(law.form)}
    for name in (name for name in middle if name in ("flops", "params", "tokens")):
        if law.loss(middle | {name: middle[name] * 1.01})[0] >= law.loss(middle)[0] * (1 - 1e-9):
            raise UsageError(f"the losses do not fall with {name}; no law of form {law.form}")
