"""From command-line words to dataclasses. tyro parses and makes `--help` from the fields and their
docstrings; every mistake becomes one line.

The options of a verb are a frozen dataclass. `train`, `describe` and `plan` also take every leaf of
the config: `parse_with_config` splits their words into the two, and `override` applies the second
to a config. Unknown names are looked for before tyro parses, so that the message can name the
nearest option; what tyro reports in a box is folded to a line."""

import contextlib
import dataclasses
import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

import tyro

from headway.config import Config, UsageError

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
HELP = {"--help", "-h"}


@dataclass(frozen=True)
class RecipeOptions:
    """Options of the verbs that start from a recipe."""

    recipe: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")
    ] = ""
    """Name of a recipe, or FILE.py:FUNCTION for one of your own."""
    json: bool = False
    """End with one JSON object."""


T = TypeVar("T")
R = TypeVar("R", bound=RecipeOptions)


def parse(options: type[T], args: Sequence[str], prog: str, default: T | None = None) -> T:
    """Return an instance of the dataclass `options` from `args`, starting from `default`. Prints
    help and raises SystemExit(0) for `--help`. Raises UsageError, one line, for everything that
    does not parse."""
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


def parse_with_config(options: type[R], args: Sequence[str], prog: str) -> tuple[R, list[str]]:
    """Return the options of a verb and the other words, which name leaves of the config. A word
    belongs to the option before it. `--help` prints the verb's options; with a recipe it stays
    among the other words, so that `override` lists the leaves too."""
    verb_words, config_words = split_words(options, [word for word in args if word not in HELP])
    parsed = parse(options, verb_words, prog)
    if HELP & set(args):
        with contextlib.suppress(SystemExit):
            parse(options, ["--help"], prog)
        print(_config_help(prog))
        if not parsed.recipe:
            raise SystemExit(0)
        config_words.append("--help")
    return parsed, config_words


def split_words(options: type, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of the options of a verb, and those that name leaves of the config. A word
    belongs to the option before it; `--help` is the verb's."""
    flags = list(_flags(options))
    _check_names(args, [*flags, *_config_flags()])
    verb_words: list[str] = []
    config_words: list[str] = []
    words = verb_words
    for word in args:
        if word.startswith("--"):
            words = verb_words if _flag(word) in flags or word in HELP else config_words
        words.append(word)
    return verb_words, config_words


def load_recipe(verb: str, recipe: str, words: Sequence[str]) -> Config:
    """Return the config of a recipe with the leaves that `words` name."""
    from headway import recipes

    if not recipe:
        raise UsageError(f"{verb} needs a recipe; use {recipe_names()}")
    return override(recipes.load(recipe), words, f"headway {verb} {recipe}")


def override(base: Config, args: Sequence[str], prog: str) -> Config:
    """Return `base` with the leaves that `args` name, under their full names or shorthands."""
    _check_names(args, _config_flags())
    return parse(Config, list(_long_names(args)), prog, base)


def recipe_names() -> str:
    """List what a verb takes as its recipe."""
    from headway.recipes import RECIPES

    return f"{', '.join(RECIPES)}, or FILE.py:FUNCTION"


def nearest(word: str, known: Sequence[str]) -> str:
    """Return the known word most like `word`, as a whole or by its last part; "" for none."""
    by_tail = {name.rpartition(".")[2].strip("-"): name for name in reversed(known)}
    tail = difflib.get_close_matches(word.rpartition(".")[2].strip("-"), by_tail, n=1, cutoff=0.75)
    whole = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return whole[0] if whole else by_tail[tail[0]] if tail else ""


def print_json(wanted: bool, value: dict[str, Any]) -> None:
    """Print the last line of stdout, when `--json` asked for it; numbers that are not finite are
    null, as in metrics.jsonl."""
    if wanted:
        from headway.report.sinks import plain  # NumPy, which `--help` does without

        print(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))


def _config_help(prog: str) -> str:
    short = "\n".join(f"  {short:<20} {leaf}" for short, leaf in SHORTHANDS.items())
    if not prog.endswith("plan"):  # which tries every mesh
        short += f"\n  {'--mesh hp=2,ep=2':<20} --mesh.hp 2 --mesh.ep 2"
    return (
        f"recipes: {recipe_names()}\n\n"
        f"short for\n{short}\n\n"
        f"Every leaf of the config is an option: `{prog} RECIPE --help` lists them.\n"
    )


def _flags(options: Any, prefix: str = "") -> Iterator[str]:
    """Yield every option that tyro makes of a dataclass: `--a.b-c`, switches `--a.no-b-c` too."""
    for field in dataclasses.fields(options):
        name = field.name.rstrip("_").replace("_", "-")  # `as_` is --as
        if dataclasses.is_dataclass(field.type):
            yield from _flags(field.type, f"{prefix}{name}.")
        elif tyro.conf.Positional not in get_args(field.type):
            yield f"--{prefix}{name}"
            if field.type is bool:
                yield f"--{prefix}no-{name}"


def _config_flags() -> list[str]:
    return [*_flags(Config), *SHORTHANDS, "--mesh"]


def _flag(word: str) -> str:
    """Return the option of `--a_b=c` as tyro spells it, `--a-b`."""
    return word.partition("=")[0].replace("_", "-")


def _check_names(args: Sequence[str], known: list[str]) -> None:
    for word in args:
        name = _flag(word)
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
    """Expand `hp=2,ep=2` to `--mesh.hp 2 --mesh.ep 2`."""
    for axis, size in mesh_axes(text).items():
        yield from (f"--mesh.{axis}", str(size))


def mesh_axes(text: str) -> dict[str, int]:
    """Return the axes and sizes of `hp=2,ep=2`. Raise UsageError for another text."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in ("dp", "hp", "ep") or not size.isdecimal():
            raise UsageError(
                f"--mesh {text!r} is no AXIS=N[,AXIS=N]; use dp, hp and ep, as in hp=2,ep=2"
            )
        sizes[axis] = int(size)
    return sizes


def _unboxed(text: str) -> str:
    """Return as one line what tyro's box, of `│` and `─` or dashes alone, says below its title."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        inside = line.strip("│╰╯ ")
        if inside.startswith("╭") or set(inside) <= {"─", "-"}:
            paragraphs.append([])
        else:
            paragraphs[-1].append(inside)
    body = next((p for p in paragraphs[1:] if p), paragraphs[0])
    sentence = " ".join(" ".join(body).split()).rstrip(".")
    if bad := _NO_NUMBER.fullmatch(sentence):
        flag, kind, value = bad.groups()
        return f"{flag} {value} is no {'whole ' if kind == 'int' else ''}number"
    return sentence[:1].lower() + sentence[1:]


_NO_NUMBER = re.compile(r"Error parsing (\S+): .* (?:to )?(int|float)\b[^:]*: '?(.*?)'?")
"""What tyro says of a word that Python's `int` or `float` refuses."""
