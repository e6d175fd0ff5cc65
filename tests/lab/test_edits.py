"""Edits of models that other processes import."""

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
