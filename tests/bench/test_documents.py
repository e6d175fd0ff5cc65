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
