"""A law of runs: fitted, tested on their own top rungs, and read for a forecast.

A fit is a JSON object with the replicates of its bootstrap, so that a forecast needs nothing else.
Its hash is checked when it is read (`lab.sealed`)."""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from headway.config import UsageError
from headway.lab import laws
from headway.lab.backtest import Backtest, backtested, interval, law_data, numbers
from headway.lab.laws import Columns, Form, Irreducible, Law
from headway.lab.rungs import Runs
from headway.lab.sealed import Kind, file_sha256

KIND = Kind("headway law fit", "headway law fit FILE.csv --json > FIT")
NEAR = 0.2
"""Nats by which a pinned irreducible loss is moved, to show what it matters."""


class Forecast(NamedTuple):
    """A prediction."""

    loss: float
    low: float
    high: float
    level: float
    """Probability with which a run lies in low … high."""
    at: dict[str, float]
    """FLOPs, parameters, tokens, … of the run."""
    tokens: dict[str, float] | None
    """`best`, `low` and `high`: the number of tokens with the least loss, of an isoflop law."""
    if_irreducible: dict[str, float]
    """The loss that the law gives with another irreducible loss."""

    def sentences(self, irreducible: Irreducible) -> list[str]:
        """Return lines of text; one says what a pinned irreducible loss leaves out."""
        at = ", ".join(f"{name} {value:.4g}" for name, value in self.at.items())
        text = f"loss {self.loss:.4f} ({self.level:.0%}: {self.low:.4f} … {self.high:.4f}) at {at}"
        if self.tokens:
            best, low, high = (self.tokens[k] for k in ("best", "low", "high"))
            text += f"; best with {best:.3g} tokens ({low:.3g} … {high:.3g})"
        others = ", ".join(f"{v:.4f} with {name}" for name, v in self.if_irreducible.items())
        return [text, *pinned_warning(irreducible, others)]


def pinned_warning(irreducible: Irreducible, others: str) -> list[str]:
    """Return the sentence that an interval with a pinned irreducible loss needs; none otherwise."""
    if irreducible.value is None or irreducible.sd:
        return []
    text = f"the interval takes an irreducible loss of exactly {irreducible} for granted"
    return [f"{text}; the forecast is {others}" if others else text]


@dataclass(frozen=True)
class Facts:
    """What a fit was made of, and what it says of itself. JSON has the fields under these names."""

    source: str
    """Name of the CSV file."""
    source_sha256: str
    runs: int
    rungs: int
    level: float
    """Probability of the intervals."""
    residual_sd: float
    """Of log losses about the law."""
    seed_noise: float
    """Standard deviation of one run over seeds beside the residuals, nats."""
    huber: float
    """Where squares turn into absolute values, in log loss."""
    backtest: tuple[Backtest, ...]
    notes: tuple[str, ...]
    """What was not possible, in sentences."""

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON has them."""
        rows = [row._asdict() for row in self.backtest]
        return {**vars(self), "backtest": rows, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Facts":
        """Return what `to_dict` wrote, out of an object that may have more."""
        values = {field.name: value[field.name] for field in fields(cls)}
        values["backtest"] = tuple(Backtest(**row) for row in values["backtest"])
        values["notes"] = tuple(values["notes"])
        return cls(**values)


@dataclass(frozen=True)
class Fit:
    """A law with what its file told."""

    law: Law
    others: tuple[tuple[str, Law], ...]
    """The same runs with another irreducible loss, without replicates."""
    tokens: Law | None
    """Tokens of the minima as a power of FLOPs, of an isoflop law."""
    seed_noise_R: np.ndarray
    """What the seed of one run adds to the loss of each replicate, nats."""
    facts: Facts

    def to_dict(self) -> dict[str, Any]:
        """Return the fit as a JSON object, not sealed."""
        law, level = self.law, self.facts.level
        ci = {k: interval(v, level) for k, v in law.parameter_draws().items()}
        return {
            "kind": KIND.name,
            "form": law.form,
            "irreducible": str(law.irreducible),
            "parameters": law.parameters(),
            "intervals": ci,
            **self.facts.to_dict(),
            "law": _law_dict(law),
            "others": {name: _law_dict(other) for name, other in self.others},
            "tokens_law": _law_dict(self.tokens) if self.tokens else None,
            "seed_noise_draws": numbers(self.seed_noise_R),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Fit":
        """Return what `to_dict` wrote."""
        form = value["form"]
        laws_of = {k: _law_from(form, v) for k, v in value["others"].items()}
        tokens = value["tokens_law"]
        return cls(
            _law_from(form, value["law"]),
            tuple(laws_of.items()),
            _law_from("power", tokens) if tokens else None,
            np.array(value["seed_noise_draws"]),
            Facts.from_dict(value),
        )

    def sentences(self) -> list[str]:
        """Return the fit as lines of text."""
        facts, level = self.facts, self.facts.level
        draws = self.law.parameter_draws()
        head = f"{facts.source}: {facts.runs} runs on {facts.rungs} rungs"
        lines = [f"{head}, {laws.EQUATION[self.law.form]}"]
        for name, value in self.law.parameters().items():
            if name == "irreducible" and self.law.irreducible.value is not None:
                lines.append(f"  {name:<12} {self.law.irreducible}, as given")
                continue
            low, high = interval(draws[name], level)
            lines.append(f"  {name:<12} {value:.5g} ({level:.0%}: {low:.5g} … {high:.5g})")
        lines.append(f"  {'residuals':<12} {facts.residual_sd:.2%} of the loss")
        for name, law in self.others[-1:]:
            value = law.parameters()["irreducible"]
            lines.append(f"  fitted {name}ly, the irreducible loss would be {value:.4g}")
        for row in facts.backtest:
            lines.append(
                f"  without the top {row.dropped_rungs} of the rungs it predicts them with "
                f"{row.mean_error:+.2%} ({row.inside} of {row.runs} in the interval)"
            )
        return [*lines, *(f"note: {note}" for note in facts.notes)]

    def predict(self, at: dict[str, float], level: float | None = None) -> Forecast:
        """Return the forecast of one run. `at` names every input of the law; FLOPs alone, of a law
        in parameters and tokens, are spent on the best of both (C = 6·N·D). Raises UsageError for
        an input that is missing, and for one that the law does not read."""
        level = level or self.facts.level
        names = laws.inputs(self.law.form)
        given = list(at)
        if "flops" in at and "params" in names and not {"params", "tokens"} & set(at):
            at = self._best_split(at)
            given.remove("flops")
        if missing := [f"--{name}" for name in names if name not in at]:
            raise UsageError(f"a law of form {self.law.form} also needs {' and '.join(missing)}")
        if unread := [f"--{name}" for name in given if name not in names]:
            raise UsageError(
                f"a law of form {self.law.form} at {' and '.join(f'--{n}' for n in names)} does "
                f"not read {' and '.join(unread)}; leave it out"
            )
        x = {name: np.array([at[name]]) for name in names}
        draws_R = self.law.draws(x)[:, 0] + self.seed_noise_R
        low, high = interval(draws_R, level)
        tokens = None
        if self.tokens:
            spread = interval(self.tokens.draws(x, noise=False)[:, 0], level)
            best = float(self.tokens.loss(x)[0])
            tokens = {"best": best, "low": spread[0], "high": spread[1]}
        others = {name: float(law.loss(x)[0]) for name, law in self.others}
        loss = float(self.law.loss(x)[0])
        return Forecast(loss, low, high, level, at, tokens, others)

    def _best_split(self, at: dict[str, float]) -> dict[str, float]:
        """Return parameters and tokens of the least loss for C = 6·N·D."""
        rest = {k: v for k, v in at.items() if k in laws.inputs(self.law.form)}
        if missing := set(laws.inputs(self.law.form)) - {"params", "tokens", *rest}:
            raise UsageError(f"a law of form {self.law.form} also needs --{missing.pop()}")
        product = at["flops"] / 6
        low, high = 0.05 * math.log(product), 0.95 * math.log(product)
        for _ in range(4):
            params = np.exp(np.linspace(low, high, 401))
            x = {name: np.full(401, value) for name, value in rest.items()}
            i = int(np.argmin(self.law.loss({**x, "params": params, "tokens": product / params})))
            low, high = (math.log(params[min(max(i + d, 0), 400)]) for d in (-1, 1))
        n = math.exp((low + high) / 2)
        return {**at, "params": n, "tokens": product / n}


def fit_runs(
    runs: Runs,
    irreducible: Irreducible,
    *,
    level: float = laws.LEVEL,
    seed_noise: float | None = None,
    bootstraps: int = laws.BOOTSTRAPS,
    delta: float = 1e-3,
    seed: int = 0,
) -> Fit:
    """Return the law of some runs, with its back-test. Raises UsageError where they give none.

    Args:
        seed_noise: standard deviation of one run over seeds, nats, where the losses have less of
            it than the run that is forecast (means or minima of several). None: of an isoflop
            file the scatter about the parabolas, else 0: residuals have it."""
    options = {"delta": delta, "seed": seed}
    x, loss_N, vertices = law_data(runs)
    law = laws.fit(runs.form, x, loss_N, irreducible, bootstraps=bootstraps, **options)
    tokens = None
    if vertices is not None:
        of_tokens = {"bootstraps": bootstraps, "seed": seed, "delta": 1.0, "falling": False}
        tokens = laws.fit("power", x, vertices.tokens_B, Irreducible(0.0), **of_tokens)
    if seed_noise is None:
        seed_noise = vertices.seed_noise if vertices is not None else 0.0
    generator = np.random.default_rng(seed + 1)
    residual_sd = float(np.sqrt((law.residual_N**2).sum() / (len(loss_N) - len(law.theta_P))))
    notes: list[str] = []
    backtest = backtested(runs, irreducible, level, notes, **options)
    others = _other_floors(runs.form, x, loss_N, irreducible, notes, **options)
    seed_noise_R = seed_noise * generator.standard_normal(bootstraps)
    facts = Facts(
        source=runs.path.name,
        source_sha256=file_sha256(runs.path),
        runs=len(runs.loss_N),
        rungs=len(np.unique(runs.rung_N)),
        level=level,
        residual_sd=residual_sd,
        seed_noise=seed_noise,
        huber=delta,
        backtest=backtest,
        notes=tuple(notes),
    )
    return Fit(law, others, tokens, seed_noise_R, facts)


def _other_floors(
    form: Form, x: Columns, loss_N: np.ndarray, irreducible: Irreducible, notes: list[str], **o: Any
) -> tuple[tuple[str, Law], ...]:
    """Return the law with the irreducible loss moved by `NEAR`, and free, where it was stated."""
    if irreducible.value is None:
        return ()
    near = irreducible.sd or NEAR
    moved = [irreducible.value - near, irreducible.value + near]
    values = [Irreducible(round(v, 12)) for v in moved if 0 < v < loss_N.min()]
    others = []
    for other in [*values, Irreducible(None)]:
        try:
            others.append((str(other), laws.fit(form, x, loss_N, other, bootstraps=1, **o)))
        except UsageError as error:
            notes.append(f"not with an irreducible loss {other}: {error}")
    return tuple(others)


def _law_dict(law: Law) -> dict[str, Any]:
    return {
        "irreducible": list(law.irreducible),
        "theta": law.theta_P.tolist(),
        "theta_draws": [numbers(row) for row in law.theta_RP],
        "floor_draws": numbers(np.exp(law.log_floor_R)),
        "noise_draws": numbers(law.noise_R),
        "residuals": numbers(law.residual_N),
    }


def _law_from(form: Form, value: dict[str, Any]) -> Law:
    with np.errstate(divide="ignore"):
        log_floor_R = np.log(np.array(value["floor_draws"]))
    return Law(
        form,
        Irreducible(*value["irreducible"]),
        np.array(value["theta"]),
        np.array(value["theta_draws"]),
        log_floor_R,
        np.array(value["noise_draws"]),
        np.array(value["residuals"]),
    )
