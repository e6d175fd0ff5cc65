"""Recipes: functions that return one `Config`. An experiment is a difference of recipes."""

import difflib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from headway.config import Config, UsageError
from headway.recipes.cpu import cpu_step, demo, dense, latent, moe, multi_head_latent, shakespeare
from headway.recipes.gpu import large, small

_FUNCTIONS = (demo, dense, moe, latent, multi_head_latent, shakespeare, cpu_step, small, large)
RECIPES: dict[str, Callable[[], Config]] = {recipe.__name__: recipe for recipe in _FUNCTIONS}
"""Every recipe by the name that the command line takes."""


def load(name: str) -> Config:
    """Return the config of a recipe: one of `RECIPES`, or `path/to/file.py:function` of your own.
    Raises UsageError for an unknown name (with the nearest one), file or function."""
    if ":" in name or name.endswith(".py"):
        return _from_file(name)
    recipe = RECIPES.get(name.replace("-", "_"))
    if recipe is None:
        near = difflib.get_close_matches(name.replace("-", "_"), RECIPES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"unknown recipe {name!r}; {hint}use {', '.join(RECIPES)}, or FILE.py:FUNCTION"
        )
    return recipe()


def source(name: str) -> str:
    """Return the source of a recipe that `load` accepts, for run.json: the function's, or for
    FILE.py:FUNCTION the whole file's."""
    if name.endswith(".py") or ":" in name:
        return Path(name.rpartition(":")[0]).read_text("utf-8")
    return inspect.getsource(RECIPES[name.replace("-", "_")])


def _from_file(name: str) -> Config:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function:
        raise UsageError(f"recipe {name!r} names no function; use FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise UsageError(f"recipe {name!r}: there is no file {path}; use FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = vars(module).get(function)
    if not callable(recipe):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UsageError(
            f"recipe {name!r}: {path} has no function {function}; "
            f"it has {', '.join(names) or 'none'}"
        )
    config = recipe()
    if not isinstance(config, Config):
        raise UsageError(
            f"recipe {name!r} returned a {type(config).__name__}; "
            "it must return a headway.config.Config"
        )
    return config
