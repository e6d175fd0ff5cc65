"""Tables of finished runs: one row each, or mean and interval by group.

A row is a run: its config as dotted paths, and what its result.json has beside it. Losses on
different text cannot be compared: where runs were validated on several, tables are ordered within
each text first, and groups are of one text. Nor can losses without copied targets in windows of
different lengths, which give away others."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from headway.config import UsageError, leaves
from headway.lab.folder import read_result
from headway.lab.statistics import t_interval
from headway.lab.where import Row, condition, field_named

METRIC = "bits_per_byte"
TEXT = "validation.fingerprint"
"""Equal for runs that were validated on the same text."""
WINDOW = "data.seq_len"
SHOWN = (METRIC, "cpu_seconds", "tokens", "error")
"""Results that a table shows beside the fields that differ."""


def run_folders(root: Path) -> list[Path]:
    """Return the folders of runs below `root`/runs, by hash."""
    return sorted(path for path in (root / "runs").glob("*") if path.is_dir())


def read_rows(root: Path) -> list[dict[str, Any]]:
    """Return the finished runs below `root`/runs, by hash. Raises UsageError where there is none.
    Folders without a result are left out: they are not finished."""
    rows, folders = [], run_folders(root)
    for folder in folders:
        if "config" in (result := read_result(folder) or {}):
            config = leaves(result.pop("config"))
            rows.append({**config, **leaves(result)})
    if not rows:
        what = f"{len(folders)} runs, none of them finished" if folders else "no runs"
        raise UsageError(f"{root} has {what}; make some with headway compare or headway sweep")
    return rows


def select(rows: Sequence[Row], where: str) -> list[Row]:
    """Return the rows for which a condition (`lab.where`) holds."""
    return [*filter(condition(where, fields_of(rows)), rows)] if where.strip() else [*rows]


def fields_of(rows: Iterable[Row]) -> list[str]:
    """Return the fields that any row has."""
    return [*dict.fromkeys(field for row in rows for field in row)]


def ordered(rows: Sequence[Row], by: str) -> list[Row]:
    """Return rows by the values of a field, or with a leading `-` from the largest down, those of
    one validation text together; rows without a value come last."""
    field = field_named(by.removeprefix("-"), fields_of(rows))
    known = [row for row in rows if row.get(field) is not None]
    numbers = all(isinstance(row[field], int | float) for row in known)
    known.sort(key=lambda r: r[field] if numbers else str(r[field]), reverse=by.startswith("-"))
    for name in _compared_within(field):  # keeps the order within a text
        known.sort(key=lambda row: str(row.get(name)))
    return [*known, *(row for row in rows if row.get(field) is None)]


def groups(rows: Sequence[Row], by: Sequence[str], metric: str = METRIC) -> list[dict[str, Any]]:
    """Return a row per combination of the values of some fields, and of what keeps values of the
    metric apart (the validation text) where there are several: them, `n` runs with a value of the
    metric, its `mean` and `ci95` over them (Student's t; None for one), and `failed` runs."""
    known = fields_of(rows)
    metric = field_named(metric, known)
    if not any(row.get(metric) is None or _is_number(row[metric]) for row in rows):
        raise UsageError(f"--metric {metric} is no number; use one, as {METRIC}")
    several = [
        name for name in _compared_within(metric) if len({row.get(name) for row in rows}) > 1
    ]
    fields = [*dict.fromkeys([*(field_named(name, known) for name in by), *several])]
    parts: dict[tuple, list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(_hashable(row.get(field)) for field in fields), []).append(row)
    table = []
    for part in parts.values():
        values = [row[metric] for row in part if _is_number(row.get(metric))]
        table.append(
            {
                **{field: part[0].get(field) for field in fields},
                "n": len(values),
                "mean": math.fsum(values) / len(values) if values else None,
                "ci95": list(t_interval(values)) if len(values) > 1 else None,
                "failed": len(part) - len(values),
            }
        )
    return table


def _compared_within(metric: str) -> tuple[str, ...]:
    """Return the fields in which runs must agree for their values of a metric to be compared."""
    return (TEXT, WINDOW) if metric.endswith("_uncopied") else (TEXT,)


def differing(rows: Sequence[Row]) -> list[str]:
    """Return the fields of configs that are not the same in all rows."""
    shared = ("config_hash", *SHOWN)
    return [
        field
        for field in fields_of(rows)
        if "." in field
        and field not in shared
        and (field == TEXT or not field.startswith("validation."))
        and len({repr(row.get(field)) for row in rows}) > 1
    ]


def shown(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows with the hash, the fields that differ, and `SHOWN`."""
    fields = ["config_hash", *differing(rows), *SHOWN]
    return [{field: row.get(field) for field in fields} for row in rows]


def as_text(table: Sequence[Row]) -> str:
    """Return rows with the same fields as aligned columns; paths by their last part where that is
    unique."""
    names = list(table[0])
    tails = [name.rpartition(".")[2] for name in names]
    heads = [t if tails.count(t) == 1 else n for t, n in zip(tails, names, strict=True)]
    cells = [[_cell(row[name]) for name in names] for row in table]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *cells]
    ]
    return "\n".join(lines)


def as_csv(table: Sequence[Row]) -> str:
    """Return rows with the same fields as CSV with a header; an interval is two columns."""
    flat = [
        {k: v for name, value in row.items() for k, v in _columns(name, value)} for row in table
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _columns(name: str, value: Any) -> list[tuple[str, Any]]:
    if name == "ci95":
        low, high = value or (None, None)
        return [("ci95_low", low), ("ci95_high", high)]
    return [(name, " ".join(map(str, value)) if isinstance(value, list) else value)]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"
    if isinstance(value, list):
        return " … ".join(map(_cell, value)) if _numbers(value) else " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _numbers(values: Sequence[Any]) -> bool:
    return bool(values) and all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hashable(value: Any) -> Any:
    return repr(value)
