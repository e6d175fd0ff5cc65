"""The runs of a CSV file with a header, on rungs of compute.

flops,loss              power
budget,tokens,loss      isoflop
params,tokens,loss      chinchilla; with a column granularity or experts the other forms"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from headway.config import UsageError
from headway.lab.laws import Columns, Form, inputs


@dataclass(frozen=True)
class Runs:
    """The runs of a CSV file."""

    path: Path
    form: Form
    x: Columns
    """Columns above 0, [N]; those of `inputs` and, for isoflop, `tokens`."""
    loss_N: np.ndarray

    @property
    def compute_N(self) -> np.ndarray:
        """FLOPs, 6·N·D where parameters and tokens are known."""
        return self.x["flops"] if "flops" in self.x else 6 * self.x["params"] * self.x["tokens"]

    @property
    def rung_N(self) -> np.ndarray:
        """Return the rung of each run, int64: 0 for the largest compute; a rung is what lies within
        a factor of 2."""
        compute_N = self.compute_N
        octave_N = np.floor(np.log2(compute_N.max() / compute_N) + 0.05)
        return np.unique(octave_N, return_inverse=True)[1]

    def where(self, keep_N: np.ndarray) -> "Runs":
        """Return some of the runs."""
        x = {name: values[keep_N] for name, values in self.x.items()}
        return replace(self, x=x, loss_N=self.loss_N[keep_N])


def read_runs(path: Path, form: Form) -> Runs:
    """Return the runs of a CSV file with a header. Raises UsageError for a missing column and for
    a value that is not above 0, with its line."""
    names = ("budget", "tokens") if form == "isoflop" else inputs(form)
    table = read_table(path, (*names, "loss"))
    if form == "isoflop":
        table["flops"] = table.pop("budget")
    loss_N = table.pop("loss")
    return Runs(path, form, table, loss_N)


def read_table(
    path: Path, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Return columns of a CSV file, float64 [N] of numbers above 0; `optional` ones where they are
    there. Raises UsageError for a missing column, a file without rows, and a value that is not
    above 0, with its line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            head = [name.strip() for name in rows.fieldnames or ()]
            rows.fieldnames = head
            lines = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {error}; give a CSV file") from None
    if missing := [name for name in names if name not in head]:
        raise UsageError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(head) or 'none'}"
        )
    if not lines:
        raise UsageError(f"{path} has no rows below its header; give a row per run")
    wanted = [*names, *(name for name in optional if name in head)]
    values: dict[str, list[float]] = {name: [] for name in wanted}
    for line, row in lines:
        for name in wanted:
            try:
                number = float(row[name])
            except (TypeError, ValueError):
                number = math.nan
            if not 0 < number < math.inf:
                raise UsageError(f"{path} line {line}: {name} {row[name]!r} is no number above 0")
            values[name].append(number)
    return {name: np.array(column) for name, column in values.items()}
