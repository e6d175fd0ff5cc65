"""`world:TASK[,OPTION=VALUE…]` → the world."""

import dataclasses

from headway.config import UsageError
from headway.data.worlds.mqar import Mqar
from headway.data.worlds.world import World

TASKS = "mqar"


def parse_world(spec: str, length: int = 0) -> World:
    """Return the world of a spec; `world:` may be left out, and a length wins over that of the
    spec. Raises UsageError for an unknown task or option, and for sizes that do not fit together.
    """
    task, *options = spec.removeprefix("world:").split(",")
    options += [f"length={length}"] if length else []
    match task:
        case "mqar":
            world = _with_options(Mqar(), options)
        case _:
            raise UsageError(f"there is no world {task!r}; use {TASKS}")
    world.check()
    return world


def _with_options(world: World, options: list[str]) -> World:
    """Return the world with fields replaced by `NAME=VALUE`."""
    assert dataclasses.is_dataclass(world) and not isinstance(world, type)
    values = {}
    known = {field.name: field.default for field in dataclasses.fields(world)}
    for option in options:
        name, _, value = option.partition("=")
        if name not in known:
            names = ", ".join(known)
            raise UsageError(f"world:{world.name} has no option {name!r}; use {names}")
        if isinstance(known[name], int):
            if not value.isdecimal():
                raise UsageError(
                    f"world:{world.name} takes a whole number for {name}, not {value!r}"
                )
            values[name] = int(value)
        else:
            values[name] = value
    return dataclasses.replace(world, **values)
