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


HELPERS = """
LIMIT, UNREAD = 0.5, 1
TABLE = {"b": (1, 2), "a": 3}


def share(x):
    return x / TABLE["a"]


def inner(values):
    return [share(x) for x in values if x < LIMIT]


def unread():
    return UNREAD
"""


def test_what_a_function_reads_of_its_folder(tmp_path, monkeypatch):
    """The functions that it calls, theirs too, and constants; not what it does not read, nor what
    other packages have."""
    (tmp_path / "rule_helpers.py").write_text(HELPERS)
    (tmp_path / "rule_judge.py").write_text(
        "import json\nfrom statistics import mean\nfrom rule_helpers import inner, unread\n\n\n"
        "def judge(least, rows):\n    return json.dumps(mean(inner(rows)) > least)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    judge = importlib.import_module("rule_judge").judge
    for name in ("rule_judge", "rule_helpers"):
        monkeypatch.delitem(sys.modules, name)
    reads = edits.helpers(partial(judge, 0.1))
    assert reads.keys() == {"inner", "share", "LIMIT", "TABLE"} and reads["LIMIT"] == "0.5"
    assert reads["share"].startswith("def share(x):") and reads["TABLE"] == '{"a": 3, "b": [1, 2]}'
    assert edits.helpers(scaled) == {}
