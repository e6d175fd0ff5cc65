"""docs/plan.md: the example is what the command prints, the table what the bench measured."""

import json
import re
import statistics
from pathlib import Path

from tests.command import call

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "plan.md").read_text("utf-8")


def test_the_example_is_the_output():
    (command, example) = re.findall(
        r"<!-- (plan [^>]+) -->\n```\n(.*?)\n```\n<!-- end -->", TEXT, re.DOTALL
    )[0]
    assert call(*command.split()).out.strip() == example.strip(), f"refresh it: headway {command}"


def test_the_table_is_what_the_bench_measured():
    rows = json.loads((DOCS / "numbers" / "plan_step.json").read_text())["rows"]
    shown = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| ([\d.]+) \|", TEXT, re.MULTILINE)
    assert [name for name, *_ in shown] == [row["recipe"] for row in rows]
    for row, (_, *numbers) in zip(rows, shown, strict=True):
        medians = [1e3 * statistics.median(row[key]) for key in ("predicted", "measured")]
        assert [f"{medians[0]:.0f}", f"{medians[1]:.0f}", f"{row['ratio']:.2f}"] == numbers
