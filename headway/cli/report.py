"""`headway report`: one page from one run or several."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from headway.cli.options import parse, print_json


@dataclass(frozen=True)
class Report:
    """One offline HTML page from one run, or from several in the same charts."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
    """Run folders."""
    out: str = ""
    """File to write; empty means report.html in the run folder, or here for several runs."""
    json: bool = False
    """End with one JSON object."""


def report(args: Sequence[str]) -> int:
    """Run `headway report RUN [RUN…]` and return its exit code."""
    options = parse(Report, args, "headway report")

    from headway.report.html import load_runs, write_page
    from headway.report.ranking import ranking

    folder = Path(options.runs[0]) if len(options.runs) == 1 else Path()
    runs = load_runs(options.runs)
    path = write_page(runs, options.out or str(folder / "report.html"))
    ranked = ranking(runs)
    print(f"report of {', '.join(options.runs)}: {path}")
    if ranked.sentence:
        print(ranked.sentence)
    answer = {"report": str(path), "runs": list(options.runs), "ranking": ranked.order}
    print_json(options.json, answer)
    return 0
