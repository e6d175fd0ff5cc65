"""The efficiency gain of a change: how much more compute the baseline needs for the same loss.

At a rung of C FLOPs with loss L the gain is f⁻¹(L)/C, f the law of the baseline's losses: 1.3 means
that the baseline needs 30% more. Where the baseline was run at the rung too, its law goes through
that loss, and only the exponent and the irreducible loss are the fit's. Divided by the time per
FLOP it is the speed-up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from headway.config import UsageError
from headway.lab.forecast import Fit
from headway.lab.rungs import read_table

Verdict = Literal["gains", "loses", "not transferable", "cannot tell"]
OPTIONAL = ("baseline", "tokens_per_second", "baseline_tokens_per_second")


@dataclass(frozen=True)
class Rung:
    """The gain at one amount of compute."""

    flops: float
    runs: int
    gain: float
    low: float
    high: float
    """∞ (null in JSON) where the baseline may never reach the change's loss."""
    speedup: float | None
    """The gain over the time that a token takes more; None without tokens per second."""


@dataclass(frozen=True)
class Gain:
    """The gain at every rung, and whether it holds from one to the next."""

    rungs: tuple[Rung, ...]
    verdict: Verdict
    sure: bool
    """Whether no interval that the verdict rests on holds 1."""
    level: float

    def sentences(self) -> list[str]:
        """Return a line per rung and the verdict."""
        lines = []
        for rung in self.rungs:
            line = f"{rung.flops:.3g} FLOPs: gain {rung.gain:.3f} ({self.level:.0%}: "
            line += f"{rung.low:.3f} … {rung.high:.3f}), {rung.runs} runs"
            lines.append(line + (f", speed-up {rung.speedup:.3f}" if rung.speedup else ""))
        why = {
            "gains": "it gains at every rung",
            "loses": "it loses at every rung",
            "not transferable": "it gains at one rung and loses at another",
            "cannot tell": "an interval holds 1",
        }[self.verdict]
        unsure = (
            "" if self.sure or self.verdict == "cannot tell" else ", though an interval holds 1"
        )
        return [*lines, f"{self.verdict}: {why}{unsure}"]


def gain(fit: Fit, path: Path, level: float | None = None) -> Gain:
    """Return the gain of a change over the baseline of a power law.

    Args:
        path: CSV of the change's runs: `flops`, `loss`, and if they were measured `baseline` (its
            loss at these FLOPs) and `tokens_per_second`, `baseline_tokens_per_second`. Rows of
            equal FLOPs are seeds.
    Raises: UsageError for a law that is none of FLOPs, fewer than two rungs, or a loss that the
        baseline never reaches; for tokens per second of one side alone."""
    law = fit.law
    level = level or fit.facts.level
    if law.form not in ("power", "isoflop"):
        raise UsageError(f"a gain needs a law of FLOPs; this fit is of form {law.form}")
    table = read_table(path, ("flops", "loss"), OPTIONAL)
    if len(speeds := [name for name in OPTIONAL[1:] if name in table]) == 1:
        raise UsageError(
            f"{path} has {speeds[0]} alone; a speed-up needs {' and '.join(OPTIONAL[1:])}"
        )
    rungs = np.unique(table["flops"])
    if len(rungs) < 2:
        raise UsageError(f"{path} has one rung; whether a gain holds takes two or more")
    values = law.parameters(), law.parameter_draws()
    generator = np.random.default_rng(0)
    rows = []
    for flops in rungs:
        part = {name: column[table["flops"] == flops] for name, column in table.items()}
        n, changed = len(part["loss"]), float(part["loss"].mean())
        x = {"flops": np.array([flops])}
        changed_R = _mean_of_runs(fit, changed, n, generator)
        if "baseline" in part:
            base = float(part["baseline"].mean())
            base_R = _mean_of_runs(fit, base, n, generator)
        else:
            base, base_R = float(law.loss(x)[0]), law.draws(x, noise=False)[:, 0]
        least = values[0]["irreducible"]
        if min(changed, base) <= least:
            raise UsageError(
                f"{path}: a loss of {min(changed, base):g} at {flops:g} FLOPs is not above the "
                f"baseline's irreducible loss, {least:.4g}"
            )
        point = float(_ratio(base, changed, **_exponent(values[0])))
        least_R = values[1]["irreducible"]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            draws_R = _ratio(np.maximum(base_R, least_R), changed_R, **_exponent(values[1]))
        # a replicate whose irreducible loss is above the change's: the baseline never gets there
        draws_R = np.where(changed_R > least_R, draws_R, np.inf)
        tail = (1 - level) / 2
        low, high = np.quantile(draws_R, [tail, 1 - tail], method="nearest").tolist()
        speedup = None
        if set(OPTIONAL[1:]) <= set(part):
            times = part["tokens_per_second"] / part["baseline_tokens_per_second"]
            speedup = point * float(times.mean())
        rows.append(Rung(float(flops), n, point, low, high, speedup))
    return Gain(tuple(rows), *_verdict(rows), level)


def _mean_of_runs(fit: Fit, loss: float, n: int, generator: np.random.Generator) -> np.ndarray:
    """Return replicates of the mean loss of n runs, nats `[R]`: residuals and seed noise anew."""
    R = len(fit.law.noise_R)
    residual_R = generator.choice(fit.law.noise_R, (n, R)).mean(0)
    return loss * np.exp(residual_R) + generator.choice(fit.seed_noise_R, (n, R)).mean(0)


def _exponent(values: dict[str, Any]) -> dict[str, Any]:
    return {"least": values["irreducible"], "alpha": values["alpha"]}


def _ratio(base: Any, changed: Any, least: Any, alpha: Any) -> Any:
    """Return C′/C with L(C) = base and L(C′) = changed, of a law least + A·C^−alpha."""
    return ((base - least) / (changed - least)) ** (1 / alpha)


def _verdict(rungs: list[Rung]) -> tuple[Verdict, bool]:
    above, below = [r.gain > 1 for r in rungs], [r.gain < 1 for r in rungs]
    surely_above, surely_below = [r.low > 1 for r in rungs], [r.high < 1 for r in rungs]
    if any(above) and any(below):
        return "not transferable", any(surely_above) and any(surely_below)
    if all(surely_above):
        return "gains", True
    if all(surely_below):
        return "loses", True
    return "cannot tell", False
