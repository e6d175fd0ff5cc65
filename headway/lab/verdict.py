"""What the rows of a study say of its claims; computed, never typed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.config import UsageError
from headway.lab.measurement import Verdict as Said
from headway.lab.registered import claim_record, rule_record
from headway.lab.rows import Row, check_texts, row_key
from headway.lab.statistics import ALPHA, Interval, Region, Verdict, detectable, seeds_for, verdicts
from headway.lab.study import Claim, Rule, Study, expected


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim and what the confirming runs say of it."""

    claim: Claim
    registered: bool
    seeds: list[int]
    """Those with whole pairs."""
    dropped: list[int]
    """Those with a diverged run."""
    answer: str
    """`holds`, `refuted`, `cannot_tell` (also where diverged runs leave too few pairs), or `open`
    where there are too few seeds."""
    estimate: float | None
    ci: Interval | None
    alpha_adjusted: float
    mde80: float | None
    """The smallest difference that as many seeds show in 80% of studies, at 5%."""
    settling: tuple[int, float] | None
    """Of `cannot_tell`: seeds, and CPU minutes for all of them, that would settle a difference as
    large as the estimate in 80% of studies; None where it lies on the edge."""

    @property
    def prediction_hit(self) -> bool | None:
        """Return whether the estimate lies in the predicted interval."""
        prediction = self.claim.prediction
        if prediction is None or self.estimate is None:
            return None
        return prediction.low <= self.estimate <= prediction.high

    def to_dict(self) -> dict[str, Any]:
        """Return the claim and its verdict as JSON has them."""
        contrast = self.claim.contrasts[0]
        return {
            **claim_record(self.claim),
            "statistic": statistic(self.claim),
            "arm": contrast.arm,
            "baseline": contrast.baseline,
            "registered": self.registered,
            "seeds": self.seeds,
            "dropped": self.dropped,
            "verdict": self.answer,
            "estimate": self.estimate,
            "ci": self.ci and list(self.ci),
            "alpha_adjusted": self.alpha_adjusted,
            "mde80": self.mde80,
            "settling": self.settling,
            "prediction_hit": self.prediction_hit,
        }


def statistic(claim: Claim) -> str:
    """Say what is measured."""
    named = [f"{c.arm} − {c.baseline} at {c.steps} steps" for c in claim.contrasts]
    what = {"slope": "slope of ", "ordered": "largest of "}.get(claim.region, "")
    metrics = {"bits_per_byte": "", "bits_per_byte_uncopied": ", without copied targets"}
    where = metrics.get(claim.metric, f", {claim.metric}")
    return f"{what}{'; '.join(named)}{where}"


def judge(study: Study, rows: Sequence[Row], registered: set[str]) -> list[Judged]:
    """Judge all registered claims of a study as one family, and each other one, which is
    exploratory, beside them. A claim with fewer seeds than it asks for is `open`, whatever they
    say, and counts in the family."""
    check_texts(rows)
    family = [claim for claim in study.claims if claim.id in registered]
    judged: dict[str, Judged] = {}
    for group in (family, *([c] for c in study.claims if c.id not in registered)):
        pairs = [_pairs(claim, rows) for claim in group]
        ready = [
            x_CN if x_CN.shape[1] >= claim.min_seeds else x_CN[:, :0]
            for claim, (x_CN, _, _) in zip(group, pairs, strict=True)
        ]
        tested: list[tuple[np.ndarray, Region, float]] = [
            (_tested(claim, x_CN), claim.region, claim.margin)
            for claim, x_CN in zip(group, ready, strict=True)
        ]
        for claim, (_, seeds, dropped), (tested_CN, *_), verdict in zip(
            group, pairs, tested, verdicts(tested), strict=True
        ):
            is_open = len(seeds) + len(dropped) < claim.min_seeds
            judged[claim.id] = _judged(
                claim, claim.id in registered, seeds, dropped, tested_CN, verdict, is_open, rows
            )
    return [judged[claim.id] for claim in study.claims]


def _judged(
    claim: Claim,
    registered: bool,
    seeds: list[int],
    dropped: list[int],
    x_CN: np.ndarray,
    verdict: Verdict,
    is_open: bool,
    rows: Sequence[Row],
) -> Judged:
    if verdict.ci is None:
        answer, level = "open" if is_open else "cannot_tell", verdict.alpha_adjusted
        return Judged(claim, registered, seeds, dropped, answer, None, None, level, None, None)
    x_N = x_CN[x_CN.mean(1).argmax()]
    sd, settling = float(x_N.std(ddof=1)), None
    distance = min(abs(verdict.estimate - edge) for edge in _edges(claim))
    if verdict.answer == "cannot_tell" and distance > 0:
        n = seeds_for(distance, sd, alpha=min(verdict.alpha_adjusted, ALPHA))
        settling = n, n * _minutes(claim, rows)
    return Judged(
        claim,
        registered,
        seeds,
        dropped,
        verdict.answer,
        verdict.estimate,
        verdict.ci,
        verdict.alpha_adjusted,
        detectable(sd, len(x_N)),
        settling,
    )


def metric(row: Row, name: str) -> float | None:
    """Return a number of a row: a field, or one of its scores; None where it diverged, or was
    measured before there was the field. Raises UsageError where there is no such number."""
    scores = row.get("scores", {})
    if name not in row and name not in scores and row["bits_per_byte"] is not None:
        known = ", ".join(("bits_per_byte", "bits_per_byte_uncopied", *scores))
        raise UsageError(f"a claim reads {name}, which the rows do not have; they have {known}")
    return row.get(name, scores.get(name))


@dataclasses.dataclass(frozen=True)
class JudgedRule:
    """A rule and what the confirming runs say of it."""

    rule: Rule
    registered: bool
    said: Said

    def to_dict(self) -> dict[str, Any]:
        """Return the rule and its verdict as JSON has them."""
        record = {n: v for n, v in rule_record(self.rule).items() if not n.startswith("judge")}
        said = {"verdict": self.said.answer, "why": self.said.why}
        return {**record, "registered": self.registered, **said}


def judge_rules(study: Study, rows: Sequence[Row], registered: set[str]) -> list[JudgedRule]:
    """Judge the rules of a study, each by the confirming rows of its texts; `open` while one of
    these is missing."""
    check_texts(rows)
    judged = []
    for rule in study.rules:
        keys = expected(study, "confirm", rule.corpora)
        known = [row for row in rows if row_key(row) in keys]
        said = Said("open", f"{len(known)} of {len(keys)} runs")
        if len(known) == len(keys):
            said = _ruled(rule, known)
        judged.append(JudgedRule(rule, rule.id in registered, said))
    return judged


def _ruled(rule: Rule, rows: Sequence[Row]) -> Said:
    """Return what a rule says; where it cannot do without a run that diverged, name that."""
    diverged = [row for row in rows if row["bits_per_byte"] is None]
    try:
        return rule.judge(rows)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        if not diverged:
            raise
    named = ", ".join(f"{row['arm']} (seed {row['seed']}, {row['corpus']})" for row in diverged)
    return Said("cannot_tell", f"These runs diverged: {named}.")


def _edges(claim: Claim) -> tuple[float, ...]:
    """Return where the region of a claim ends."""
    match claim.region:
        case "equal":
            return claim.margin, -claim.margin
        case "not_worse" | "slope":
            return (claim.margin,)
        case "better" | "ordered":
            return (-claim.margin,)


def _pairs(claim: Claim, rows: Sequence[Row]) -> tuple[np.ndarray, list[int], list[int]]:
    """Return the paired differences of the confirming runs, [C, N], with their seeds, and the seeds
    that a diverged run drops."""
    bits = {
        (row["arm"], row["seed"], row["budget"]): metric(row, claim.metric)
        for row in rows
        if row["stage"] == "confirm" and row["corpus"] == claim.corpus
        # without the metric, and not for divergence: a row that was measured without it
        if metric(row, claim.metric) is not None or row["bits_per_byte"] is None
    }

    def values(seed: int) -> list[float | None] | None:
        """Return arm and baseline of each contrast; None where a run is not there yet."""
        names = [(n, seed, c.steps) for c in claim.contrasts for n in (c.arm, c.baseline)]
        return [bits[name] for name in names] if all(name in bits for name in names) else None

    by_seed = {seed: values(seed) for seed in sorted({seed for _, seed, _ in bits})}
    whole = {seed: v for seed, v in by_seed.items() if v is not None and None not in v}
    dropped = [seed for seed, v in by_seed.items() if v is not None and None in v]
    x_NC = [[v[i] - v[i + 1] for i in range(0, len(v), 2)] for v in whole.values()]  # type: ignore[operator]
    x_CN = np.asarray(x_NC, dtype=np.float64).reshape(len(whole), len(claim.contrasts)).T
    return x_CN, list(whole), dropped


def _tested(claim: Claim, x_CN: np.ndarray) -> np.ndarray:
    """Return what is tested: the slope of each seed over `x`, or the differences themselves."""
    if claim.region != "slope":
        return x_CN
    x_C = np.asarray(claim.x) - np.mean(claim.x)
    return (x_C @ x_CN / (x_C @ x_C))[None, :]


def _minutes(claim: Claim, rows: Sequence[Row]) -> float:
    """Return the CPU minutes of one seed of a claim's runs, each as if alone."""
    names = {(n, c.steps) for c in claim.contrasts for n in (c.arm, c.baseline)}
    seconds: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if (name := (row["arm"], row["budget"])) in names and row["corpus"] == claim.corpus:
            seconds.setdefault(name, []).append(row["cpu_seconds"])
    return sum(math.fsum(x) / len(x) for x in seconds.values()) / 60
