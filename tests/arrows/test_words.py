"""Words that the field does not use, and names that say nothing, stay out of the package."""

import ast
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arrows.rooms import PACKAGE

NAMES = {
    *"Exchange Ranks Flight Trip Trips Arrival Returning Journey Arriving Ready Wire".split(),
    *"Spread ALONE Pieces Piece Layout Busy Heartbeat Writing ToldError Sent Dispatched".split(),
    *"_Way _Launch _Land _Leaving _add_up _last_words _see_others_off _flight".split(),
    *"flight depart arrive land landed take_turns go_on leads apart last_micro_batch".split(),
    *"crowd crowded by_hand beside lean tells travel travels masters".split(),
}
"""Not the name of anything: AsyncCollective, TokenDispatcher, ShardSpec, Watchdog, … are theirs."""

FUNCTIONS = {"native", "takes", "rest", "agree", "first", "begin", "spread", "collect"}
"""Not the name of a function, though they may name a value."""

LOCALS = {"found", "kept", "made", "own", "got"}
"""Not the name of a variable or an argument, which is named after what it holds."""


def functions(tree: ast.AST) -> Iterator[str]:
    """Names of functions that are defined or called."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name):
                yield name
            case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
                yield name


def variables(tree: ast.AST) -> Iterator[str]:
    """Names that are assigned, and of arguments."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name


def names(path: Path) -> Iterator[str]:
    """Every identifier of a file; not its comments and strings."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.NAME:
                yield token.string


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_retired_words_stay_out(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert NAMES & set(names(path)) == set()
    assert FUNCTIONS & set(functions(tree)) == set()
    assert LOCALS & set(variables(tree)) == set()


def test_the_search_finds_them(tmp_path):
    path = tmp_path / "old.py"
    path.write_text("def rest(made):\n    'Flight'\n    got = native(made)\n    return got.leads\n")
    tree = ast.parse(path.read_text())
    assert NAMES & set(names(path)) == {"leads"}
    assert FUNCTIONS & set(functions(tree)) == {"rest", "native"}
    assert LOCALS & set(variables(tree)) == {"made", "got"}
