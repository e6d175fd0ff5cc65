"""`world:TASK[,OPTION=VALUE…]` → the world."""

import dataclasses

from headway.config import UsageError
from headway.data.worlds.copying import Copy
from headway.data.worlds.facts import Facts
from headway.data.worlds.group import Group
from headway.data.worlds.mqar import Mqar
from headway.data.worlds.multiplication import Multiplication
from headway.data.worlds.parity import Parity
from headway.data.worlds.sums import Sums
from headway.data.worlds.world import World

TASKS = "mqar, s5, a5, s3, parity, copy, facts, multiplication, sums"


def parse_world(spec: str, length: int = 0) -> World:
    """Return the world of a spec; `world:` may be left out, and a length is one more option. Raises
    UsageError for an unknown task or option, for one that is given twice, and for sizes that do not
    fit together."""
    task, *options = spec.removeprefix("world:").split(",")
    options += [f"length={length}"] if length else []
    match task:
        case "mqar":
            world = _with_options(Mqar(), options)
        case "s5" | "a5" | "s3":
            world = _with_options(Group(task), options)
        case "parity":
            world = _with_options(Parity(), options)
        case "copy":
            world = _with_options(Copy(), options)
        case "facts":
            world = _with_options(Facts(), options)
        case "multiplication":
            world = _with_options(Multiplication(), options)
        case "sums":
            world = _with_options(Sums(), options)
        case _:
            raise UsageError(f"there is no world {task!r}; use {TASKS}")
    world.check()
    return world


def options_of(world: World) -> dict[str, int | str]:
    """Return the options of a world and their values; the task of a group is none."""
    assert dataclasses.is_dataclass(world)
    names = [field.name for field in dataclasses.fields(world) if field.name != "group"]
    return {name: vars(world)[name] for name in names}


def _with_options(world: World, options: list[str]) -> World:
    """Return the world with fields replaced by `NAME=VALUE`."""
    assert dataclasses.is_dataclass(world) and not isinstance(world, type)
    values, known = {}, options_of(world)
    for option in options:
        name, _, value = option.partition("=")
        if name not in known:
            names = ", ".join(known)
            raise UsageError(f"world:{world.name} has no option {name!r}; use {names}")
        if name in values:
            twice = f"{name}={values[name]} and {name}={value}"
            raise UsageError(f"world:{world.name} is given {twice}; use one")
        if isinstance(known[name], int):
            if not value.isdecimal():
                raise UsageError(
                    f"world:{world.name} takes a whole number for {name}, not {value!r}"
                )
            values[name] = int(value)
        else:
            values[name] = value
    return dataclasses.replace(world, **values)
