"""The rooms of the package are those that the documents and the tests have."""

import pytest

from tests.arrows.rooms import ALLOWED, PACKAGE, PAGES, ROOMS, ROOT, rewrite

OTHER_TESTS = {"arrows", "bench", "golden", "parity", "studies"}
"""Folders of tests/ that belong to no room: habits, bench/, recorded losses, N ranks = 1, studies/."""


def folders(root, pattern="**/"):
    """Folders with a Python file, as paths relative to `root`."""
    names = {p.parent.relative_to(root).as_posix() for p in root.glob(f"{pattern}*.py")}
    return names - {"."}


def test_every_room_is_in_the_list():
    assert folders(PACKAGE, "*/") == set(ALLOWED)


def test_a_room_imports_only_rooms_before_it():
    names = [room.name for room in ROOMS]
    for position, room in enumerate(ROOMS[:-1]):
        assert set(room.imports.split()) <= set(names[:position]), room.name


def test_tests_mirror_the_package():
    rooms = folders(PACKAGE)
    other = {f for f in folders(ROOT / "tests") if f.split("/")[0] not in OTHER_TESTS}
    assert other <= rooms
    assert {name for name in rooms if "/" not in name} <= other, "a room without tests"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_documents_show_the_list(path):
    page = path.read_text("utf-8")
    assert rewrite(page, PAGES[path]()) == page, "run python -m tests.arrows.rooms"


def test_agents_read_a_short_page():
    assert (ROOT / "AGENTS.md").read_text("utf-8").count("\n") < 150
