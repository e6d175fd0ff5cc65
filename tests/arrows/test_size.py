"""The package stays small: a file is read in one sitting, the whole in an afternoon."""

from tests.arrows.rooms import PACKAGE

LINES = {p: p.read_text("utf-8").count("\n") for p in sorted(PACKAGE.rglob("*.py"))}
TOTAL = 44_000
"""20,317 lines of Python when the rooms were renovated; then the hub, the engine, the server, the laboratory, worlds, laws, studies, trackers and near-copies. Raise it together
with a feature that needs more."""


def test_no_file_is_longer_than_a_sitting():
    too_long = {str(p): n for p, n in LINES.items() if n > 400}
    assert too_long == {}, "look for the second idea"


def test_files_are_short_on_average():
    assert sum(LINES.values()) / len(LINES) <= 150


def test_the_package_does_not_grow_by_itself():
    assert sum(LINES.values()) < TOTAL
