"""docs/serving.md lists what is read."""

from tests.server.tables import PAGE, rewrite


def test_the_tables_are_those_of_the_code():
    text = PAGE.read_text("utf-8")
    assert rewrite(text) == text, "run `python -m tests.server.tables`"
