"""A study: series of runs, and claims about them that are registered before the first one.

    studies/NAME.py                     STUDY, the arms, seeds, budgets and claims
    studies/registered/NAME.json        what was decided before the first row (lab.registered)
    docs/numbers/studies/NAME.json      a row per finished run, committed as they come
    DIR/runs/HASH                       the runs themselves, as of every experiment

A row that is in the file is not trained again."""

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from headway.checkpoint.lock import InUseError
from headway.config import UsageError, with_leaf
from headway.lab.experiment import Arm, Experiment, PlannedArm
from headway.lab.folder import Scores, write_json
from headway.lab.measurement import Measurement, Verdict
from headway.lab.rows import Row, check_dtype_here, check_texts, read_rows, row_key
from headway.lab.runs import Run, execute_branches, read_result
from headway.lab.statistics import Region
from headway.lab.user_file import raised
from headway.train.budget import Budget
from headway.train.records import Log

Stage = Literal["screen", "confirm"]
NONE = "{folder} has no studies; call this in the repository, or give --studies"


class Prediction(NamedTuple):
    """What was expected before the first run: a value and its 80% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def within(cls, value: float, half: float) -> "Prediction":
        """Return a value with an interval that reaches as far to both sides."""
        return cls(value, value - half, value + half)


class Contrast(NamedTuple):
    """A paired difference: `arm` − `baseline` in bits per byte, after `steps` of the baseline."""

    arm: str
    baseline: str
    steps: int


@dataclass(frozen=True)
class Claim:
    """A statement on paired differences of the confirming runs, and the region in which it holds:
    `better` (below −margin), `not_worse` (below margin), `equal` (within margin), `ordered` (every
    contrast below −margin), `slope` (the slope of the contrasts over `x` is above margin)."""

    id: str
    text: str
    source: str
    """Where the statement is from."""
    contrasts: tuple[Contrast, ...]
    """One, but for `ordered` and `slope`."""
    region: Region
    corpus: str
    margin: float = 0.0
    min_seeds: int = 8
    prediction: Prediction | None = None
    metric: str = "bits_per_byte"
    """`bits_per_byte`, `bits_per_byte_uncopied`, or one of the study's scores; lower is better."""
    x: tuple[float, ...] = ()
    """Of a `slope`: the abscissa of each contrast."""


@dataclass(frozen=True)
class Rule:
    """A statement that is no paired difference, and the rule by which rows decide it: a correlation
    over arms, a rate at which a task is solved. Judged once, when all confirming runs of its texts
    are there."""

    id: str
    text: str
    source: str
    """Where the statement is from."""
    rule: str
    """When it holds, when it is refuted."""
    judge: Callable[[Sequence[Row]], Verdict]
    """Reads the confirming rows of its texts."""
    corpora: tuple[str, ...] = ()
    """The texts whose runs it reads; none: all."""


@dataclass(frozen=True)
class Series:
    """Arms that are compared on one text at several budgets, with the seeds of one stage."""

    stage: Stage
    corpus: str
    experiment: Experiment
    """Its budget is replaced by each of `steps`."""
    steps: tuple[int, ...]
    """Budgets, in steps of the baseline. Runs of an arm and a seed share the longest one's trunk
    where the recipe fixes `optim.warmup_steps`."""

    def plan(self, log: Log) -> dict[str, dict[int, PlannedArm]]:
        """Return arm → steps of the baseline → the arm, planned."""
        arms: dict[str, dict[int, PlannedArm]] = {}
        for steps in self.steps:
            experiment = dataclasses.replace(self.experiment, budget=Budget(steps=steps))
            for arm in experiment.plan(log):
                arms.setdefault(arm.name, {})[steps] = arm
        return arms


@dataclass(frozen=True)
class Study:
    """Series of runs and claims about them."""

    name: str
    title: str
    series: tuple[Series, ...]
    claims: tuple[Claim, ...] = ()
    rules: tuple[Rule, ...] = ()
    scores: Scores | None = None
    """What is measured of each finished run beside bits per byte."""
    notes: str = ""
    """What a reader of the results needs to know, in sentences."""
    tables: Mapping[str, Callable[[Sequence[Row]], list[Row]]] = field(default_factory=dict)
    """Name → a table of numbers that are no claims, from the rows."""
    picture: Callable[[Sequence[Row]], str] | None = None
    """What is drawn of the rows, an SVG, "" while there are too few."""
    also: tuple[str, ...] = ()
    """Studies and measurements whose rows the tables read too."""


@dataclass(frozen=True)
class Task:
    """The runs of one arm and seed, of all lengths."""

    stage: Stage
    corpus: str
    arm: str
    seed: int
    planned: Mapping[int, PlannedArm]
    scores: Scores | None = None

    def runs(self) -> dict[int, Run]:
        """Return steps of the baseline → run."""
        return {
            steps: dataclasses.replace(arm.run(self.seed), scores=self.scores)
            for steps, arm in self.planned.items()
        }

    def key(self, steps: int) -> tuple:
        """Return what names a row."""
        return self.stage, self.corpus, self.arm, self.seed, steps

    def flops(self, known: Collection[tuple]) -> float:
        """Return about how much training makes the rows that are not known: the trunk's, from
        which shorter runs branch off."""
        missing = (arm for steps, arm in self.planned.items() if self.key(steps) not in known)
        return max((arm.train_flops for arm in missing), default=0.0)


def names(folder: Path) -> list[str]:
    """Return the names of the studies in a folder."""
    return sorted(p.stem for p in folder.glob("*.py") if "\nSTUDY = " in p.read_text("utf-8"))


def load(name: str, folder: Path) -> Study | Measurement:
    """Return the study of a file. Raises UsageError where there is none or the file raises."""
    path = folder / f"{name}.py"
    if not path.is_file() or name not in names(folder):
        known = ", ".join(names(folder))
        raise UsageError(
            f"{folder} has no study {name}; use one of {known}"
            if known
            else NONE.format(folder=folder)
        )
    spec = importlib.util.spec_from_file_location(f"study_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # stale within a second
    sys.path.insert(0, str(folder.resolve().parent))  # a study may import its neighbours
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except Exception as error:
        raise raised(error, path) from error
    finally:
        sys.path.pop(0)
        sys.dont_write_bytecode = before
    return vars(module)["STUDY"]


def tasks(study: Study, log: Log = lambda _: None) -> Iterator[Task]:
    """Yield what is to be trained: the series in their order, each seed by seed, so that a study
    that is interrupted has whole pairs. Raises UsageError where one name stands for two arms."""
    hashes: dict[tuple, str] = {}
    for series in study.series:
        arms = series.plan(log)
        for name, by_steps in arms.items():
            for steps, arm in by_steps.items():
                key = (series.stage, series.corpus, name, steps)
                if hashes.setdefault(key, arm.run(0).key) != arm.run(0).key:
                    raise UsageError(
                        f"study {study.name}: two series call different arms {name!r} on "
                        f"{series.corpus} at {steps} steps; give one another name"
                    )
        for seed in series.experiment.seeds:
            for name, by_steps in arms.items():
                yield Task(series.stage, series.corpus, name, seed, by_steps, study.scores)


def expected(study: Study, stage: Stage, corpora: Sequence[str] = ()) -> set[tuple]:
    """Return the keys of the rows that a stage has when all its runs are there, on some texts or,
    where none is named, on all."""
    return {
        (stage, series.corpus, arm.name, seed, steps)
        for series in study.series
        if series.stage == stage and (not corpora or series.corpus in corpora)
        for arm in series.experiment.arms
        for seed in series.experiment.seeds
        for steps in series.steps
    }


def quick(study: Study) -> Study:
    """Return a study of the same arms that takes seconds: half the layers, a few steps on Python's
    standard library, or on its worlds. Sizes are not matched. It shows that a study runs, and
    proves nothing."""

    def small(arm: Arm) -> Arm:
        config = arm.config
        n_layers = max(1, config.model.n_layers // 2)
        changes = QUICK if config.data.worlds else {**QUICK, **QUICK_TEXT}
        for name, value in {"model.n_layers": n_layers, **changes}.items():
            config = with_leaf(config, name, value)
        return dataclasses.replace(arm, config=config)

    budgets = sorted({n for part in study.series for n in part.steps})
    few = {n: 10 + 2 * i for i, n in enumerate(budgets)}
    series = [
        dataclasses.replace(
            part,
            steps=tuple(few[n] for n in part.steps),
            experiment=dataclasses.replace(
                part.experiment,
                arms=tuple(small(arm) for arm in part.experiment.arms),
                seeds=part.experiment.seeds[:2],
                match=(),
                eval_tokens=2048,
            ),
        )
        for part in study.series
    ]
    return dataclasses.replace(study, series=tuple(series))


QUICK = {"data.batch_size": 32, "optim.warmup_steps": 1}
QUICK_TEXT = {
    "data.source": ("stdlib",),
    "data.weights": (),
    "data.near_duplicates": "keep",
    # many short sequences: arms get whole ones, and as many FLOPs within 0.3%
    "data.seq_len": 16,
    "data.batch_size": 64,
}


def train(
    study: Study,
    todo: Sequence[Task],
    root: Path,
    rows_file: Path,
    log: Log = print,
    until: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Train what neither the rows nor the run folders have, and return all rows. Several processes
    share the work; a task that another one trains is passed over, and its row written by whoever
    looks next. No task is begun once `until()` is true. Raises UsageError where this machine would
    train in another dtype than those rows."""
    with_finished(study, todo, root, rows_file)
    seconds, flops = 0.0, 0.0
    for at, task in enumerate(todo, 1):
        if until():
            break
        rows = with_finished(study, [task], root, rows_file)
        known = {row_key(row) for row in rows}
        missing = {n: run for n, run in task.runs().items() if task.key(n) not in known}
        if not missing:
            continue
        began = time.monotonic()
        check_dtype_here(rows, task.arm, task.seed, next(iter(missing.values())).config)
        # with those that are finished here: one may be the trunk of what is missing
        there = {n: r for n, r in task.runs().items() if read_result(root / "runs" / r.key)}
        family = {**missing, **there}
        log(f"{at} of {len(todo)}: {task.arm}, seed {task.seed}, {task.corpus}, {task.stage}")
        try:
            results = execute_branches(list(family.values()), root)
        except InUseError:
            log("  another process trains it")
            continue
        for steps, result in zip(family, results, strict=True):
            bits = result["bits_per_byte"]
            what = f"{bits:.4f} bits/byte" if bits is not None else result["error"]
            log(f"  {steps} steps: {what}, {result['cpu_seconds']:.0f} CPU s")
        with_finished(study, [task], root, rows_file)
        seconds, flops = seconds + time.monotonic() - began, flops + task.flops(known)
        if left := sum(later.flops(known) for later in todo[at:]):
            log(f"  about {left * seconds / flops / 60:,.0f} minutes left, for one process")
    return with_finished(study, todo, root, rows_file)


def tables(study: Study, rows: Sequence[Row], numbers: Path) -> dict[str, list[Row]]:
    """Return the tables of a study, from its rows and those that `numbers` has of others, also of
    measurements, which read no text; a run of several studies is one row. Raises UsageError where
    runs were validated on different texts of one name, or different runs have one name."""
    runs, measured = dict[tuple, Row](), list[Row]()
    others = (row for name in study.also for row in read_rows(numbers / f"{name}.json"))
    for row in (*rows, *others):
        if "corpus" not in row:
            measured.append(row)
            continue
        first = runs.setdefault(row_key(row), row)
        if first["config_hash"] != row["config_hash"]:
            raise UsageError(
                f"study {study.name} and one of {', '.join(study.also)}: {row['arm']}, seed "
                f"{row['seed']}, at {row['budget']} steps on {row['corpus']} are different runs; "
                "give the arm another name"
            )
    check_texts([*runs.values()])
    return {name: table([*runs.values(), *measured]) for name, table in study.tables.items()}


def with_finished(study: Study, todo: Sequence[Task], root: Path, rows_file: Path) -> list[Row]:
    """Add the finished runs of a folder to the rows of a file, and return all."""
    rows = {row_key(row): row for row in read_rows(rows_file)}
    before = len(rows)
    for task in todo:
        for steps, run in task.runs().items():
            key = task.key(steps)
            if key not in rows and (result := read_result(root / "runs" / run.key)):
                rows[key] = _row(task, steps, result)
    check_texts(list(rows.values()))
    ordered = sorted(rows.values(), key=lambda row: tuple(map(str, row_key(row))))
    if len(rows) > before:
        write_json(rows_file, {"study": study.name, "rows": ordered})
    return ordered


def _row(task: Task, steps: int, result: Mapping[str, Any]) -> Row:
    fields = "bits_per_byte bits_per_byte_uncopied config_hash train_flops steps tokens"
    fields += " cpu_seconds continued error commit cpu"
    return {
        "stage": task.stage,
        "corpus": task.corpus,
        "arm": task.arm,
        "seed": task.seed,
        "budget": steps,
        **{name: result[name] for name in fields.split()},
        **({"scores": result["scores"]} if result.get("scores") is not None else {}),
        "auto_dtype": result["auto_dtype"],
        "validation": result["validation"]["fingerprint"],
    }
