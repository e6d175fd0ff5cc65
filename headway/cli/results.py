"""`headway results`: tables of finished runs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from headway.cli.options import parse, print_json
from headway.config import UsageError


@dataclass(frozen=True)
class Results:
    """A table of the finished runs of a folder that compare or a sweep has filled."""

    dir: Annotated[str, tyro.conf.Positional]
    """Folder of the runs (DIR/runs/HASH)."""
    where: str = ""
    """A condition, as in 'moe.top_k=4 and bits_per_byte<2'; fields are those of the config and of
    result.json; and, or, not, in and parentheses."""
    group: str = ""
    """Fields, with commas: a row for each combination of their values, with the mean of the metric,
    its 95% interval and the number of runs."""
    metric: str = "bits_per_byte"
    """What `--group` averages."""
    sort: str = ""
    """Field to sort by, with a - in front from the largest down; empty: the metric."""
    csv: bool = False
    """Print CSV instead of aligned columns."""
    json: bool = False
    """End with one JSON object; `rows` are whole where nothing is grouped."""


def results(args: Sequence[str]) -> int:
    """Run `headway results DIR` and return its exit code."""
    options = parse(Results, args, "headway results")

    from pathlib import Path

    from headway.lab import results as lab

    root = Path(options.dir)
    finished = lab.read_rows(root)
    rows = lab.select(finished, options.where)
    if not rows:
        raise UsageError(f"--where {options.where!r} holds for no run in {options.dir}")
    fields = [name for name in options.group.split(",") if name]
    if fields:
        rows = lab.groups(rows, fields, options.metric)
    rows = lab.ordered(rows, options.sort or ("mean" if fields else options.metric))
    table = rows if fields else lab.shown(rows)
    print(lab.as_csv(table) if options.csv else lab.as_text(table), end="" if options.csv else "\n")
    print_json(options.json, {"rows": rows})
    if left_out := len(lab.run_folders(root)) - len(finished):
        what = f"{left_out} of the runs in {root} have no whole result.json and are left out"
        print(what, file=sys.stderr)
    return 0
