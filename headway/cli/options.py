"""From command line words to a config: tyro does the parsing, and every mistake becomes one line.

tyro makes options and `--help` from dataclasses and the docstrings of their fields; it reports
mistakes in a box. Here unknown names are found first, so that the message can name the nearest
option, and other boxes are folded to a line.
"""

import contextlib
import dataclasses
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from headway.config import Config, UsageError

T = TypeVar("T")

SHORTHANDS = {
    "--data": "--data.source",
    "--run": "--run.dir",
    "--steps": "--optim.steps",
    "--checkpoint-every": "--run.checkpoint-every",
    "--seed": "--run.seed",
    "--strict": "--run.strict",
}
"""Short names of leaves that nearly every command needs; `--mesh hp=2,ep=2` is short for `--mesh.hp
2 --mesh.ep 2`."""


def parse(options: type[T], args: Sequence[str], prog: str, default: T | None = None) -> T:
    """An instance of the dataclass `options` from `args`, starting from `default`.

    Prints help and raises SystemExit(0) for `--help`. Raises UsageError, one line, for everything
    that does not parse.
    """
    _check_names(args, list(_flags(options)))
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            if default is None:
                return tyro.cli(options, args=args, prog=prog)
            return tyro.cli(options, args=args, prog=prog, default=default)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(f"{_unboxed(box.getvalue())}; see {prog} --help") from None


def override(base: Config, args: Sequence[str], prog: str) -> Config:
    """`base` with the leaves that `args` name, under their full names or shorthands."""
    _check_names(args, [*_flags(Config), *SHORTHANDS, "--mesh"])
    return parse(Config, list(_long_names(args)), prog, base)


def take(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """(value of `flag VALUE` or `flag=VALUE`, the other words); None when the flag is not there."""
    for i, word in enumerate(args):
        if word.startswith(f"{flag}="):
            return word[len(flag) + 1 :], args[:i] + args[i + 1 :]
        if word == flag:
            if i + 1 == len(args) or args[i + 1].startswith("--"):
                raise UsageError(f"{flag} needs a value, as in `{flag} VALUE`")
            return args[i + 1], args[:i] + args[i + 2 :]
    return None, args


def take_switch(args: list[str], flag: str) -> tuple[bool, list[str]]:
    """(whether `flag` is there, the other words)."""
    return flag in args, [word for word in args if word != flag]


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word most like `word`, by its last part or as a whole; empty when none is close."""
    by_tail = {name.rpartition(".")[2].strip("-"): name for name in reversed(known)}
    tail = difflib.get_close_matches(word.rpartition(".")[2].strip("-"), by_tail, n=1, cutoff=0.75)
    whole = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return whole[0] if whole else by_tail[tail[0]] if tail else ""


def print_json(wanted: bool, value: dict[str, Any]) -> None:
    """The last line of stdout, when `--json` asked for it."""
    if wanted:
        print(json.dumps(value, ensure_ascii=False))


def _flags(options: Any, prefix: str = "") -> Iterator[str]:
    """Every option that tyro makes of a dataclass: `--a.b-c`, and `--a.no-b-c` for switches."""
    for field in dataclasses.fields(options):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            yield from _flags(field.type, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}"
            if field.type is bool:
                yield f"--{prefix}no-{name}"


def _check_names(args: Sequence[str], known: list[str]) -> None:
    for word in args:
        name = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and name not in ("--", "--help") and name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else "--help lists all options"
            raise UsageError(f"unknown option {word.partition('=')[0]}; {hint}")


def _long_names(args: Sequence[str]) -> Iterator[str]:
    words = iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--mesh":
            yield from _mesh(value if equals else next(words, ""))
        elif flag.startswith("--"):
            yield SHORTHANDS.get(flag, flag) + equals + value
        else:
            yield word


def _mesh(text: str) -> Iterator[str]:
    """`hp=2,ep=2` → `--mesh.hp 2 --mesh.ep 2`."""
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in ("dp", "hp", "ep") or not size.isdecimal():
            raise UsageError(
                f"--mesh {text!r} is no AXIS=N[,AXIS=N]; use dp, hp and ep, as in hp=2,ep=2"
            )
        yield from (f"--mesh.{axis}", size)


def _unboxed(text: str) -> str:
    """What tyro's box says below its title, as one line. The box is drawn with `│` and `─`, or with
    dashes alone."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        inside = line.strip("│╰╯ ")
        if inside.startswith("╭") or set(inside) <= {"─", "-"}:
            paragraphs.append([])
        else:
            paragraphs[-1].append(inside)
    body = next((p for p in paragraphs[1:] if p), paragraphs[0])
    found = " ".join(" ".join(body).split()).rstrip(".")
    return found[:1].lower() + found[1:]
