"""A comparison: the runs of an experiment, and the paired differences to its baseline."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.checkpoint.lock import InUseError
from headway.config import UsageError
from headway.lab.experiment import Experiment, PlannedArm
from headway.lab.folder import Wanted
from headway.lab.runs import Run, check_dtypes, documents, execute, read_result
from headway.lab.statistics import (
    Interval,
    Paired,
    crossed_bootstrap,
    holm,
    p_equal,
    p_not_worse,
    paired,
    seeds_for,
)
from headway.lab.workers import Workers
from headway.train.records import Log

ROW = (
    *"config_hash tokens train_flops bits_per_byte batches_sha256 cpu_seconds".split(),
    *"tokens_per_second attempts error".split(),
)
"""What a row takes from the result of its run."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave."""

    experiment: Experiment
    arms: tuple[PlannedArm, ...]
    rows: list[dict[str, Any]]
    """One per arm and seed: `arm`, `seed` and `ROW`."""
    differences: list[dict[str, Any]]
    """One per arm but the baseline: `arm`, `baseline`, `n_seeds`, `mean`, `sd`, `ci95`,
    `ci95_documents`, `p`, `p_holm`, `mde80`, and `dropped`, the seeds of diverged runs; with a
    margin `p_not_worse`, `p_equal`, and what it takes to see a difference of that size."""
    root: Path

    @property
    def baseline(self) -> str:
        """The name of the baseline."""
        return self.experiment.baseline or self.arms[0].name

    def bits(self, arm: str) -> dict[int, float]:
        """Return seed → bits per byte of an arm, without diverged runs."""
        rows = (row for row in self.rows if row["arm"] == arm)
        return {r["seed"]: r["bits_per_byte"] for r in rows if r["bits_per_byte"] is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return what `headway compare --json` prints, without `report`."""
        experiment = self.experiment
        return {
            "match": {
                "quantities": list(experiment.match),
                "baseline": self.baseline,
                "budget": str(experiment.budget),
                "equal": "cpu_seconds" if self._by_time else "train_flops",
            },
            "arms": [
                {
                    "name": arm.name,
                    "solved": arm.solved,
                    **arm.costs,
                    "mismatch": arm.mismatch,
                    "steps": arm.config.optim.steps,
                    "tokens": arm.tokens,
                    "train_flops": arm.train_flops,
                }
                for arm in self.arms
            ],
            "rows": self.rows,
            "differences": self.differences,
        }

    @property
    def _by_time(self) -> bool:
        return bool(self.experiment.budget.cpu_seconds) or self.experiment.equal_cpu_time


def compare(
    experiment: Experiment, root: Path, *, workers: int = 1, log: Log = print
) -> Comparison:
    """Train what is not yet in `root`/runs and compare.

    Args:
        workers: processes that train one run at a time each; this one is the first.
    Raises: UsageError where the arms cannot be compared, or runs were validated on other text."""
    arms = experiment.plan(log)
    for arm in arms:
        log(_planned(arm))
    # seed by seed, so that an interrupted comparison has whole pairs
    order = [(arm, seed) for seed in experiment.seeds for arm in arms]
    results = _train([arm.run(seed) for arm, seed in order], order, root, workers, log)
    validation = {result["validation"]["fingerprint"] for result in results}
    if len(validation) > 1:
        raise UsageError(f"runs in {root} were validated on other text; use another --dir")
    check_dtypes(results)
    rows = [
        {"arm": arm.name, "seed": seed, **{name: result[name] for name in ROW}}
        for (arm, seed), result in zip(order, results, strict=True)
    ]
    comparison = Comparison(experiment, arms, rows, [], root)
    return Comparison(experiment, arms, rows, _differences(comparison), root)


def _planned(arm: PlannedArm) -> str:
    solved = ", ".join(f"{f.rpartition('.')[2]} {v}" for f, v in arm.solved.items())
    off = ", ".join(f"{q} {v:+.2%}" for q, v in arm.mismatch.items())
    sizes = f"solved {solved}; " if solved else ""
    return f"arm {arm.name}: {sizes}{arm.config.optim.steps} steps, {arm.tokens:,} tokens; {off}"


def _train(
    runs: Sequence[Run], order: Sequence[tuple[PlannedArm, int]], root: Path, workers: int, log: Log
) -> list[dict[str, Any]]:
    """Return the results of all runs, in order."""
    names = [f"{arm.name}, seed {seed}" for arm, seed in order]
    finished = {run.key: read_result(root / "runs" / run.key) for run in runs}
    results = {key: result for key, result in finished.items() if result is not None}
    if results:
        log(f"{len(results)} of {len(runs)} runs are in {root}/runs already")
    open_ = {run.key: (run, name) for run, name in zip(runs, names, strict=True)}
    open_ = {key: item for key, item in open_.items() if key not in results}
    # this process trains too, and alone what no other can import
    with Workers(root, min(workers, len(open_)) - 1, log=log) as processes:
        for key, (run, _) in open_.items():
            processes.ask(key, Wanted(run.config, run.edit))
        while open_:
            before = len(open_)
            for key, (run, name) in list(open_.items()):
                processes.keep([*open_])
                if result := _attempt(run, root):
                    results[key] = result
                    del open_[key]
                    log(_done(name, result))
            if len(open_) == before:  # others train all that is left
                time.sleep(1)
    return [results[run.key] for run in runs]


def _attempt(run: Run, root: Path) -> dict[str, Any] | None:
    """Return the result of a run; None where another process trains it."""
    try:
        return execute(run, root)
    except InUseError:
        return None


def _done(name: str, result: Mapping[str, Any]) -> str:
    bits = result["bits_per_byte"]
    what = f"{bits:.4f} bits/byte" if bits is not None else f"diverged: {result['error']}"
    return f"{name}: {what}, {result['cpu_seconds']:.1f} CPU s"


def _differences(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the paired differences to the baseline, p values adjusted over all of them."""
    base = comparison.bits(comparison.baseline)
    rows: list[dict[str, Any]] = []
    for arm in comparison.arms:
        if arm.name == comparison.baseline:
            continue
        bits = comparison.bits(arm.name)
        seeds = [seed for seed in comparison.experiment.seeds if seed in bits and seed in base]
        if not seeds:
            raise UsageError(
                f"arm {arm.name}: no seed has a pair, since a run of each diverged; "
                "lower optim.lr or raise optim.max_skipped"
            )
        differences = [bits[seed] - base[seed] for seed in seeds]
        result = paired(differences)
        rows.append(
            {
                "arm": arm.name,
                "baseline": comparison.baseline,
                "n_seeds": result.n,
                "mean": result.mean,
                "sd": result.sd,
                "ci95": result.ci95 and list(result.ci95),
                "ci95_documents": _by_documents(comparison, arm.name, seeds),
                "p": result.p,
                "p_holm": None,
                "mde80": result.mde80,
                **_of_margin(comparison, arm.name, result, differences),
                "dropped": [seed for seed in comparison.experiment.seeds if seed not in seeds],
            }
        )
    tested = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    return rows


def _of_margin(
    comparison: Comparison, arm: str, result: Paired, differences: Sequence[float]
) -> dict[str, Any]:
    """Return the tests of the stated margin, and what seeing a difference of its size takes."""
    margin = comparison.experiment.margin
    if not margin or result.sd is None:
        return {}
    seeds = seeds_for(margin, result.sd)
    spent = [r["cpu_seconds"] for r in comparison.rows if r["arm"] in (arm, comparison.baseline)]
    return {
        "margin": margin,
        "p_not_worse": p_not_worse(differences, margin),
        "p_equal": p_equal(differences, margin),
        "seeds_for_margin": seeds,
        "cpu_minutes_for_margin": seeds * sum(spent) / len(comparison.experiment.seeds) / 60,
    }


def _by_documents(comparison: Comparison, arm: str, seeds: Sequence[int]) -> list[float] | None:
    """Return the crossed bootstrap's interval over seeds and documents; None for one seed."""
    if len(seeds) < 2:
        return None
    keys = {(row["arm"], row["seed"]): row["config_hash"] for row in comparison.rows}
    nats: dict[str, list[np.ndarray]] = {}
    bytes_N = np.empty(0)
    for name in (arm, comparison.baseline):
        losses = [documents(comparison.root, keys[name, seed]) for seed in seeds]
        if any(not np.array_equal(x.hash_N, losses[0].hash_N) for x in losses):
            raise UsageError(f"runs in {comparison.root} were validated on other documents")
        nats[name], bytes_N = [x.nats_N for x in losses], losses[0].bytes_N
    arm_SN, baseline_SN = np.stack(nats[arm]), np.stack(nats[comparison.baseline])
    interval = crossed_bootstrap(arm_SN, baseline_SN, bytes_N)
    return list(interval) if all(map(math.isfinite, interval)) else None


def table(comparison: Comparison) -> str:
    """Return the comparison as text for people."""
    differences = {row["arm"]: row for row in comparison.differences}
    header = f"{'arm':24} {'bits/byte':>9} {'sd':>7}  {'to ' + comparison.baseline:22} {'p':>6}"
    lines = [f"{header} {'active':>10} {'total':>11} {'MFLOPs/token':>12} {'B/token':>8}"]
    for arm in comparison.arms:
        bits = list(comparison.bits(arm.name).values())
        mean = float(np.mean(bits)) if bits else math.nan
        sd = f"{np.std(bits, ddof=1):.4f}" if len(bits) > 1 else ""
        row = differences.get(arm.name)
        costs = arm.costs
        lines.append(
            f"{arm.name[:24]:24} {mean:9.4f} {sd:>7}  {_difference(row):22} {_p(row):>6} "
            f"{costs['active_parameters']:10,.0f} {costs['total_parameters']:11,.0f} "
            f"{costs['flops_per_token'] / 1e6:12.3f} {costs['bytes_per_token']:8,.0f}"
        )
    return "\n".join([*lines, *map(_sentence, comparison.differences)])


def _difference(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "baseline"
    if row["ci95"] is None:
        return f"{row['mean']:+.4f}"
    return f"{row['mean']:+.4f} ± {(row['ci95'][1] - row['ci95'][0]) / 2:.4f}"


def _p(row: Mapping[str, Any] | None) -> str:
    return "" if row is None or row["p_holm"] is None else f"{row['p_holm']:.3f}"


def _sentence(row: Mapping[str, Any]) -> str:
    """Say what the pairs of an arm tell, and what it would take to know more."""
    dropped = f"; seeds {row['dropped']} diverged and are left out" if row["dropped"] else ""
    pair = f"{row['arm']} − {row['baseline']}: {row['mean']:+.4f} bits/byte"
    if row["ci95"] is None:
        return f"{pair}; one seed: no interval{dropped}"
    seeds = Interval(*row["ci95"])
    text = f"{pair}, 95% {seeds.low:+.4f} … {seeds.high:+.4f} over {row['n_seeds']} seeds"
    if row["ci95_documents"]:
        low, high = row["ci95_documents"]
        text += f", {low:+.4f} … {high:+.4f} over seeds and documents"
    text += f"; differences below {row['mde80']:.4f} are seen in less than 80% of such studies"
    if "margin" in row:
        text += (
            f"; by {row['margin']:g} or more worse: p {row['p_not_worse']:.3f}, different by as "
            f"much: p {row['p_equal']:.3f}; to see {row['margin']:g} takes "
            f"{row['seeds_for_margin']:,} seeds, {row['cpu_minutes_for_margin']:,.0f} CPU minutes"
        )
    elif row["mean"] and row["p"] >= 0.05:
        n = seeds_for(row["mean"], row["sd"])
        text += f"; one of this size takes {n:,} seeds"
    return text + dropped
