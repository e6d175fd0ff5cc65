"""Every number of docs/negative-results.md is the one in the file that a bench wrote."""

import json
import re
from statistics import mean

from bench.common import NUMBERS, ROOT


def test_lever_table_equals_levers_json():
    rows = json.loads((NUMBERS / "levers.json").read_text())["rows"]
    text = (ROOT / "docs" / "negative-results.md").read_text()
    shown = re.findall(r"^\| `([^`]+)` \| (\d+) \| (\d+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert shown
    for name, steps, seeds, bits in shown:
        found = [r["bits_per_byte"] for r in rows if (r["name"], r["steps"]) == (name, int(steps))]
        assert len(found) == int(seeds), name
        assert abs(mean(found) - float(bits)) < 6e-4, name


def test_quality_table_equals_quality_json():
    rows = json.loads((NUMBERS / "quality.json").read_text())["rows"]
    text = (ROOT / "docs" / "negative-results.md").read_text()
    shown = re.findall(
        r"^\| ([^|]+) \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d,]+) \|", text, re.MULTILINE
    )
    assert {name for name, *_ in shown} == {row["model"] for row in rows}
    for name, seeds, *bits, steps in shown:
        for budget, value in zip(("equal FLOPs", "equal time"), bits, strict=True):
            found = [r for r in rows if (r["model"], r["budget"]) == (name, budget)]
            assert len(found) == int(seeds), name
            assert abs(mean(r["bits_per_byte"] for r in found) - float(value)) < 6e-4, name
        assert round(mean(r["steps"] for r in found)) == int(steps.replace(",", "")), name


def test_the_resources_of_gpu_kernels_are_those_that_were_compiled():
    from bench.gpu_resources import table

    rows = json.loads((NUMBERS / "gpu_resources.json").read_text())["rows"]
    assert table(rows) in (ROOT / "docs" / "kernels.md").read_text("utf-8")


def test_the_launches_of_a_step_are_those_that_were_counted():
    rows = json.loads((NUMBERS / "launches.json").read_text())["rows"]
    text = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    counted = [
        sum(
            r["launches"] + r["triton"]
            for r in rows
            if (r["commit"], r["recipe"], r["part"]) == key
        )
        for key in (("d677774", "small", "all"), ("after", "small", "all"))
    ]
    ms = [r["ms"] for r in rows if (r["recipe"], r["part"]) == ("small", "all")]
    assert "| all | {:,} | {:,} | {:.0f} | {:.0f} |".format(*counted, *ms) in text
