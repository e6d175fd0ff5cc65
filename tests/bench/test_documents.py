"""Figures of docs/kernels.md are those in the files that benches wrote."""

import json

from bench.common import NUMBERS, ROOT


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
