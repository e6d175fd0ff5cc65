"""Rows of a study: a finished run each, in docs/numbers/studies/NAME.json.

A row has `stage`, `corpus`, `arm`, `seed` and `budget`, which name it, and of the result of its run
(`lab.runs.execute`) what is compared, and where and by which code it was trained. The rows of a
measurement (`lab.measurement`) have other fields."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.config import Config, UsageError
from headway.lab.runs import auto_dtype, check_dtypes

Row = dict[str, Any]


def row_key(row: Row) -> tuple:
    """Return what names a row: stage, corpus, arm, seed, budget."""
    return row["stage"], row["corpus"], row["arm"], row["seed"], row["budget"]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; [] where there is none. Raises UsageError for a damaged one."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text("utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); restore it from git") from None


def spent_seconds(rows: Sequence[Row]) -> float:
    """Return the CPU seconds of training; steps that a run continued from another are left out."""
    return math.fsum(r["cpu_seconds"] * (1 - r["continued"] / max(r["steps"], 1)) for r in rows)


def of_one_text(rows: Sequence[Row]) -> Sequence[Row]:
    """Return rows that are averaged or compared. Raises UsageError where they are of several
    texts."""
    if len(texts := sorted({row["corpus"] for row in rows})) > 1:
        raise UsageError(f"runs on {' and '.join(texts)} are not compared; give the rows of one")
    return rows


def check_texts(rows: Sequence[Row]) -> None:
    """Raise UsageError where rows of one text were validated on different ones: another version of
    the packages that it comes from; and where they were trained in different dtypes."""
    check_dtypes(rows)
    texts: dict[str, Row] = {}
    for row in rows:
        other = texts.setdefault(row["corpus"], row)
        if other["validation"] != row["validation"]:
            raise UsageError(
                f"{row['arm']}, seed {row['seed']}, and {other['arm']}, seed {other['seed']}, were "
                f"validated on different texts, both called {row['corpus']}; train them on one"
            )


def check_dtype_here(rows: Sequence[Row], arm: str, seed: int, config: Config) -> None:
    """Raise UsageError where run.dtype=auto would be another dtype on this machine than it was for
    the rows of a study, or those of the arm do not say what it was."""
    if (here := auto_dtype(config)) is None:
        return
    for row in rows:
        there = row.get("auto_dtype")  # None: the arm says its dtype; older rows do not have it
        if there != here and (there or ("auto_dtype" not in row and row["arm"] == arm)):
            was = f"run.dtype=auto was {there}" if there else "it is not known what it was"
            raise UsageError(
                f"{arm}, seed {seed}: run.dtype=auto is {here} on this machine, and for "
                f"{row['arm']}, seed {row['seed']}, {was}; train on a machine like that one's, or "
                "all anew with other --numbers and --dir"
            )
