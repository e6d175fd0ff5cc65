"""Edits of models that other processes import."""

import importlib
import sys
from functools import partial

import pytest

from headway.lab import edits
from tests.lab.test_experiment import double_head, scaled


def test_what_can_be_imported_comes_back():
    assert edits.from_dict(edits.to_dict(double_head)) is double_head
    back = edits.from_dict(edits.to_dict(partial(scaled, 2.0, how="once")))
    assert (back.func, back.args, back.keywords) == (scaled, (2.0,), {"how": "once"})
    assert edits.source(back) == edits.source(partial(scaled, 2.0, how="once"))


@pytest.mark.parametrize("bound", [(1, 2), {1: 2}, object(), {3}], ids=lambda x: type(x).__name__)
def test_values_that_json_does_not_give_back(bound):
    assert edits.to_dict(partial(scaled, bound)) is None


def test_functions_that_have_no_name_in_a_module():
    def inner(model):
        pass

    assert edits.to_dict(inner) is None and edits.to_dict(lambda model: None) is None


def test_a_file_that_is_edited_meanwhile_changes_no_source(tmp_path, monkeypatch):
    """Runs are named by it, and a study of hours reads it again and again."""
    path = tmp_path / "edited_meanwhile.py"
    function = "def halved(model):\n    return model / 2\n"
    path.write_text(function)
    monkeypatch.syspath_prepend(tmp_path)
    halved = importlib.import_module("edited_meanwhile").halved
    monkeypatch.delitem(sys.modules, "edited_meanwhile")
    before = edits.source(halved)
    assert before[0] == function
    path.write_text("def another(model):\n    return 9 * model\n\n\n" + function)
    assert edits.source(halved) == before == edits.source(partial(halved))[:2]
