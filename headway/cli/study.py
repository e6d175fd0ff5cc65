"""`headway study`: registered studies, their runs and verdicts."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from headway.cli.options import parse, print_json
from headway.config import UsageError


@dataclass(frozen=True)
class StudyOptions:
    """List the studies of a repository, or register, train and judge one. Training again continues;
    several calls share the work."""

    name: Annotated[str, tyro.conf.Positional]
    """Name of a study, or `list`."""
    register: bool = False
    """Write down claims, arms, texts and seeds, once; commit it before the first run."""
    run: bool = False
    """Train what is missing, add its rows to the study's numbers, and judge the claims."""
    verdict: bool = False
    """Judge the claims by the rows: what a call without other options does."""
    page: bool = False
    """Write docs/studies.md anew from all studies, at the end."""
    only: str = ""
    """Of one arm: train its row again, in DIR/again, and show it beside the committed one."""
    seed: int = -1
    """With --only; -1 is the first one."""
    corpus: str = ""
    """With --only or --run: a text of the study; empty: the first one of the arm, or all."""
    stage: Literal["", "screen", "confirm"] = ""
    """With --run; empty: both."""
    cpu_minutes: float = 0.0
    """With --run: start no further run after as many CPU minutes; 0 is no limit."""
    quick: bool = False
    """With --run: tiny models on Python's standard library or the study's worlds, in --dir alone:
    shows that it runs, proves nothing."""
    dir: str = "runs/studies"
    """Folder of the runs (DIR/runs/HASH)."""
    studies: str = "studies"
    """Folder of the studies' files."""
    numbers: str = "docs/numbers/studies"
    """Folder of their rows."""
    json: bool = False
    """End with one JSON object."""

    def check(self) -> None:
        """Raise UsageError for an option that would be ignored, or is out of range."""
        if self.cpu_minutes < 0:
            raise UsageError(f"--cpu-minutes {self.cpu_minutes:g} is below 0; 0 is no limit")
        for name, given, needs in (
            ("--seed", self.seed != -1, {"--only": self.only}),
            ("--stage", self.stage, {"--run": self.run}),
            ("--quick", self.quick, {"--run": self.run}),
            ("--cpu-minutes", self.cpu_minutes, {"--run": self.run}),
            ("--corpus", self.corpus, {"--run": self.run, "--only": self.only}),
        ):
            if given and not any(needs.values()):
                raise UsageError(f"{name} is for {' and '.join(needs)}; add it, or leave it out")
        if self.run and self.only:
            raise UsageError("--run trains what is missing and --only one row again; give one")
        if self.name == "list" and (self.register or self.run or self.verdict or self.only):
            raise UsageError("list is of all studies; name one to register, train or judge it")

    def check_measurement(self) -> None:
        """Raise UsageError for an option that a study without training would ignore."""
        for name, given in (
            ("--register", self.register),
            ("--only", self.only),
            ("--quick", self.quick),
            ("--stage", self.stage),
            ("--corpus", self.corpus),
            ("--cpu-minutes", self.cpu_minutes),
        ):
            if given:
                raise UsageError(f"{self.name} trains nothing: {name} is not for it; leave it out")


def study(args: Sequence[str]) -> int:
    """Run `headway study` and return its exit code."""
    options = parse(StudyOptions, args, "headway study")
    options.check()
    code = _study(options)
    if options.page and not code:
        _write_page(Path(options.studies), Path(options.numbers))
    return code


def _study(options: StudyOptions) -> int:
    from headway.lab import registered
    from headway.lab.measurement import Measurement, measure
    from headway.lab.study import load

    folder, numbers = Path(options.studies), Path(options.numbers)
    if options.name == "list":
        return _list(options, folder, numbers)
    chosen = load(options.name, folder)
    rows_file = numbers / f"{options.name}.json"
    if isinstance(chosen, Measurement):
        options.check_measurement()
        if options.run:
            result = measure(chosen, rows_file)
            _write_page(folder, numbers)
            print(f"{chosen.name}: {result['answer']}. {result['why']}")
            print_json(options.json, result)
        else:
            print(f"{chosen.name}: {chosen.claim}\n{chosen.rule}\nmeasure it with --run")
        return 0
    if options.register:
        path = registered.register(chosen, folder)
        print(f"registered in {path}; commit it before the first run")
        if not (options.run or options.verdict):
            return 0
    if options.only:
        return _again(options, chosen, folder, rows_file)
    if options.run:
        _run(options, chosen, folder, rows_file)
        if options.quick:
            print("tiny models, a few steps: it runs, and nothing is proved")
            return 0
    return _verdict(options, chosen, folder, rows_file)


def _list(options: StudyOptions, folder: Path, numbers: Path) -> int:
    from headway.lab import registered
    from headway.lab.measurement import Measurement, read_result
    from headway.lab.rows import read_rows
    from headway.lab.study import NONE, load, names

    rows: list[dict[str, Any]] = []
    if not names(folder):
        raise UsageError(NONE.format(folder=folder))
    for name in names(folder):
        chosen = load(name, folder)
        if isinstance(chosen, Measurement):
            result = read_result(numbers / f"{name}.json")
            state = result["answer"] if result else "not measured"
            rows.append({"name": name, "title": chosen.claim, "state": state, "rows": None})
            continue
        known = registered.read(chosen, folder) is not None
        n = len(read_rows(numbers / f"{name}.json"))
        state = "registered" if known else "not registered"
        n_claims = len(chosen.claims) + len(chosen.rules)
        state = f"{n_claims} claims, {state}" if n_claims else "no claims"
        rows.append({"name": name, "title": chosen.title, "state": state, "rows": n})
    for row in rows:
        runs = "" if row["rows"] is None else f", {row['rows']} runs"
        print(f"{row['name']:20} {row['state']}{runs}\n{'':20} {row['title']}")
    print_json(options.json, {"studies": rows})
    return 0


def _write_page(folder: Path, numbers: Path) -> None:
    from headway.lab.studies_page import write_page

    write_page(folder, numbers, numbers.parent.parent / "studies.md")


def _run(options: StudyOptions, chosen: Any, folder: Path, rows_file: Path) -> None:
    from headway.lab import registered
    from headway.lab.study import quick, tasks, train

    root = Path(options.dir)
    if options.quick:
        chosen, rows_file, root = quick(chosen), root / "quick" / rows_file.name, root / "quick"
    todo = [
        task
        for task in tasks(chosen)
        if task.stage in (options.stage or task.stage)
        and task.corpus in (options.corpus or task.corpus)
    ]
    if not todo:
        raise UsageError(
            f"study {chosen.name} has no runs of --stage {options.stage} on --corpus "
            f"{options.corpus}; leave one out"
        )
    if not options.quick and (record := registered.read(chosen, folder)) is not None:
        registered.check(record, todo)
    end = time.process_time() + 60 * options.cpu_minutes if options.cpu_minutes else float("inf")
    train(chosen, todo, root, rows_file, until=lambda: time.process_time() >= end)


def _again(options: StudyOptions, chosen: Any, folder: Path, rows_file: Path) -> int:
    from headway.lab import registered
    from headway.lab.rows import read_rows, row_key
    from headway.lab.study import tasks, train

    todo = [
        task
        for task in tasks(chosen)
        if task.arm == options.only
        and task.corpus in (options.corpus or task.corpus)
        and options.seed in (-1, task.seed)
    ]
    if not todo:
        arms = "; ".join(dict.fromkeys(task.arm for task in tasks(chosen)))
        seed = "any seed" if options.seed == -1 else f"seed {options.seed}"
        raise UsageError(
            f"study {chosen.name} has no arm {options.only} with {seed} on "
            f"{options.corpus or 'any text'}; its arms are: {arms}"
        )
    if (record := registered.read(chosen, folder)) is not None:
        registered.check(record, todo[:1])
    root = Path(options.dir) / "again"  # what is finished in DIR is what was committed
    saved = {row_key(row): row for row in read_rows(rows_file)}
    rows = train(chosen, todo[:1], root, root / rows_file.name)
    again = []
    for row in rows:
        if row_key(row) in {todo[0].key(steps) for steps in todo[0].planned}:
            before = saved.get(row_key(row))
            again.append({**row, "committed": before and before["bits_per_byte"]})
            saying = "no committed row" if before is None else f"committed: {_measured(before)}"
            print(f"{row['arm']}, {row['budget']} steps: {_measured(row)}; {saying}")
    print_json(options.json, {"rows": again})
    return 0


def _measured(row: Mapping[str, Any]) -> str:
    """Say what a run came to, and in which dtype where the machine chose it."""
    bits, dtype = row["bits_per_byte"], row.get("auto_dtype")
    return (row["error"] if bits is None else f"{bits:.4f}") + (f" in {dtype}" if dtype else "")


def _verdict(options: StudyOptions, chosen: Any, folder: Path, rows_file: Path) -> int:
    from headway.lab import registered
    from headway.lab.rows import read_rows, spent_seconds
    from headway.lab.study import tables
    from headway.lab.verdict import judge, judge_rules, statistic

    rows = read_rows(rows_file)
    record = registered.read(chosen, folder)
    judged = judge(chosen, rows, registered.ids(record))
    ruled = judge_rules(chosen, rows, registered.ids(record))
    for one in judged:
        print(f"{one.claim.id}: {one.answer}. {one.claim.text} [{statistic(one.claim)}]")
        if one.estimate is None or one.ci is None:
            print(f"    {len(one.seeds)} of {one.claim.min_seeds} seeds")
            continue
        low, high = one.ci
        print(f"    {one.estimate:+.4f}, {low:+.4f} … {high:+.4f}, {len(one.seeds)} seeds")
        if one.settling:
            print(f"    {one.settling[0]:,} seeds would settle it: {one.settling[1]:,.0f} CPU min")
    for one in ruled:
        print(f"{one.rule.id}: {one.said.answer}. {one.rule.text}\n    {one.said.why}")
    seconds = spent_seconds(rows)
    print(f"{chosen.name}: {len(rows)} runs, {seconds / 60:,.0f} CPU minutes")
    path = registered.registered_file(folder, chosen.name)
    print_json(
        options.json,
        {
            "study": chosen.name,
            "registered": record
            and {
                "file": str(path),
                "sha256": record["sha256"],
                "commit": registered.commit_of(path),
            },
            "rows_file": str(rows_file),
            "claims": [one.to_dict() for one in judged],
            "rules": [one.to_dict() for one in ruled],
            **tables(chosen, rows, rows_file.parent),
            "cpu_minutes": seconds / 60,
        },
    )
    return 0
