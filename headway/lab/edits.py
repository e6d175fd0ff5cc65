"""Edits of models, as other processes import them, and as they name runs. No PyTorch."""

import functools
import inspect
import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

Function = Callable[..., Any]


def source(edit: Function) -> list[str]:
    """Return the source of a function, and the values that it is bound to."""
    if isinstance(edit, functools.partial):
        return [*source(edit.func), repr(edit.args), repr(sorted(edit.keywords.items()))]
    bound = inspect.getclosurevars(edit).nonlocals
    return [_text(edit), repr(sorted(bound.items()))]


@functools.cache
def _text(function: Function) -> str:
    """Return the source of a function, read once: what runs does not change with a file that is
    edited meanwhile, where its lines may then be those of another function."""
    return inspect.getsource(function)


def to_dict(edit: Function) -> dict[str, Any] | None:
    """Return `module`, `function` and `bound` (positional and named values, None without
    `functools.partial`). None where another process cannot import it: for lambdas, closures and
    functions of the program itself or of a file that was read, and where JSON does not give the
    values back."""
    bound = None
    if isinstance(edit, functools.partial):
        edit, bound = edit.func, [list(edit.args), edit.keywords]
    module, name = edit.__module__, edit.__qualname__
    if module == "__main__" or module not in sys.modules:
        return None
    if vars(sys.modules[module]).get(name) is not edit:
        return None
    try:
        same = json.loads(json.dumps(bound)) == bound
    except TypeError:
        return None
    return {"module": module, "function": name, "bound": bound} if same else None


def from_dict(value: dict[str, Any]) -> Function:
    """Import an edit. Raises ImportError or KeyError where it is not there."""
    function = vars(import_module(value["module"]))[value["function"]]
    if value["bound"] is None:
        return function
    args, keywords = value["bound"]
    return functools.partial(function, *args, **keywords)
