"""What studies share: a verdict, and the page that is made of all results.

A study states its claim and, before anything is measured, the rule of its verdict. `python -m
studies.NAME` measures its arms, writes `studies/results/NAME.json` with machine, versions and
commit, and makes `docs/studies.md` anew from all results."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies" / "results"
PAGE = ROOT / "docs" / "studies.md"
Row = dict[str, Any]


class Verdict(NamedTuple):
    answer: str
    """`holds`, `refuted` or `cannot tell`."""
    why: str
    """One sentence with the numbers."""


class Study(NamedTuple):
    name: str
    claim: str
    rule: str
    """When it holds, when it is refuted."""
    measure: Callable[[], Sequence[Row]]
    """Runs the arms; a row per arm and setting."""
    judge: Callable[[Sequence[Row]], Verdict]


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    return mean(values), stdev(values) / math.sqrt(len(values))


def run(study: Study) -> None:
    """Measure, judge, write the result and the page."""
    from headway.report.provenance import provenance

    begin = time.process_time()
    rows = list(study.measure())
    verdict = study.judge(rows)
    where = provenance()
    result = {
        "study": study.name,
        "claim": study.claim,
        "rule": study.rule,
        "verdict": verdict.answer,
        "why": verdict.why,
        "cpu_seconds": round(time.process_time() - begin, 1),
        **{key: where[key] for key in ("machine", "versions", "commit", "dirty")},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{study.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page())
    print(f"{study.name}: {verdict.answer}. {verdict.why}")


def page(folder: Path = RESULTS) -> str:
    """docs/studies.md."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    parts = [
        "# Studies\n\nOne claim each, its rule stated before anything was measured; made by "
        "`python -m studies.NAME` from `studies/results/`.\n",
        "| study | claim | verdict |\n|---|---|---|",
        *(f"| [{r['study']}](#{r['study']}) | {r['claim']} | {r['verdict']} |" for r in results),
    ]
    return "\n".join([*parts, *map(_section, results)]) + "\n"


def _section(result: dict[str, Any]) -> str:
    rows = result["rows"]
    head = list(rows[0])
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    table += [f"| {' | '.join(_cell(row[key]) for key in head)} |" for row in rows]
    machine = result["machine"]
    return (
        f"\n## {result['study']}\n\n**Claim.** {result['claim']}\n\n**Rule.** {result['rule']}\n\n"
        f"**Verdict: {result['verdict']}.** {result['why']}\n\n" + "\n".join(table) + "\n\n"
        f"{machine['gpu'] or machine['cpu']}, torch {result['versions']['torch']}, "
        f"{result['cpu_seconds']:.0f} CPU seconds, commit {result['commit'][:10]}"
        f"{' with changes' if result['dirty'] else ''}."
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
