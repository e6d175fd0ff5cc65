"""Edits of models, as other processes import them, and as they name runs. No PyTorch."""

import contextlib
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from types import CodeType
from typing import Any

Function = Callable[..., Any]


def source(edit: Function) -> list[str]:
    """Return the source of a function, and the values that it is bound to."""
    if isinstance(edit, functools.partial):
        return [*source(edit.func), repr(edit.args), repr(sorted(edit.keywords.items()))]
    bound = inspect.getclosurevars(edit).nonlocals
    return [_text(edit), repr(sorted(bound.items()))]


def helpers(function: Function) -> dict[str, str]:
    """Return what a function reads of the modules of its own folder, and so what decides with it:
    name → source of a function, or a constant as JSON."""
    while isinstance(function, functools.partial):
        function = function.func
    folder, texts, todo = _folder(function), dict[str, str](), [function]
    while todo:
        one = todo.pop()
        for name in sorted(_names(one.__code__)):
            value = one.__globals__.get(name)
            if name in texts or value is function:
                continue
            if inspect.isfunction(value) and _folder(value) == folder:
                texts[name] = _text(value)
                todo.append(value)
            elif not callable(value) and value is not None:
                with contextlib.suppress(TypeError, ValueError):
                    texts[name] = json.dumps(value, sort_keys=True)
    return dict(sorted(texts.items()))


def _names(code: CodeType) -> set[str]:
    """Return the names that code reads, that of its comprehensions and inner functions too."""
    inner = (_names(x) for x in code.co_consts if isinstance(x, CodeType))
    return set(code.co_names).union(*inner)


def _folder(function: Function) -> str:
    return os.path.dirname(os.path.realpath(function.__code__.co_filename))


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
