"""The example of docs/plan.md is what the command prints."""

import re
from pathlib import Path

from tests.test_cli import call

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text("utf-8")


def test_the_example_is_the_output():
    (command, example) = re.findall(
        r"<!-- (plan [^>]+) -->\n```\n(.*?)\n```\n<!-- end -->", TEXT, re.DOTALL
    )[0]
    assert call(*command.split()).out.strip() == example.strip(), f"refresh it: headway {command}"
