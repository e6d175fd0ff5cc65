"""A measurement: a study that trains nothing. Its claim and the rule of its verdict are stated
before anything is measured; its result is `docs/numbers/studies/NAME.json`, with machine, versions
and commit."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from headway.config import UsageError
from headway.lab.folder import write_json

Row = dict[str, Any]


class Verdict(NamedTuple):
    answer: str
    """`holds`, `refuted`, `cannot_tell`, or `open` where runs are missing."""
    why: str
    """One sentence with the numbers."""


class Measurement(NamedTuple):
    name: str
    claim: str
    rule: str
    """When it holds, when it is refuted."""
    measure: Callable[[], Sequence[Row]]
    """Runs the arms; a row per arm and setting."""
    judge: Callable[[Sequence[Row]], Verdict]


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and its standard error."""
    return mean(values), stdev(values) / math.sqrt(len(values))


def measure(study: Measurement, path: Path) -> dict[str, Any]:
    """Measure, judge, and write the result."""
    from headway.report.provenance import provenance

    begin = time.process_time()
    rows = list(study.measure())
    where = provenance()
    result = {
        "study": study.name,
        "claim": study.claim,
        "rule": study.rule,
        **study.judge(rows)._asdict(),
        "cpu_seconds": round(time.process_time() - begin, 1),
        **{key: where[key] for key in ("machine", "versions", "commit", "dirty")},
        "rows": rows,
    }
    write_json(path, result)
    return result


def read_result(path: Path) -> dict[str, Any] | None:
    """Return what `measure` wrote, None where it did not. Raises UsageError for a damaged file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); restore it from git") from None
