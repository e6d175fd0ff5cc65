"""`headway worlds`: items of a synthetic world as JSON lines."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from headway.cli.options import parse, print_json
from headway.config import UsageError


@dataclass(frozen=True)
class Worlds:
    """Items of a synthetic world, a JSON object per line: `prompt`, `answer`, `tokens`, `targets`
    (−1 is ignored) and `meta`, what the item was drawn as."""

    task: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK", help_behavior_hint="")
    ] = ""
    """mqar, s5, a5, s3, parity, copy, facts, multiplication or sums, with options as in
    `mqar,pairs=8`."""
    n: int = 100
    """Items."""
    length: int = 0
    """Of an item: its tokens for mqar, bits, elements, events, digits; 0: as the task has it."""
    split: Literal["train", "val", "test"] = "train"
    """Splits share no item, whatever their seeds."""
    seed: int = 0
    """Other seeds give other items; those of training are its run.seed."""
    out: str = ""
    """File to write; empty: the standard output."""
    json: bool = False
    """End with one JSON object; needs --out."""


def worlds(args: Sequence[str]) -> int:
    """Run `headway worlds TASK` and return its exit code."""
    options = parse(Worlds, args, "headway worlds")
    from headway.data.worlds.lines import lines
    from headway.data.worlds.spec import TASKS, options_of, parse_world

    if not options.task:
        raise UsageError(f"worlds needs a task; use {TASKS}")
    if options.n < 1 or options.length < 0:
        name = "n" if options.n < 1 else "length"
        raise UsageError(f"--{name} {vars(options)[name]} is too small; use 1 or more")
    if options.json and not options.out:
        raise UsageError("--json ends the standard output, where the items go; give --out FILE")
    world = parse_world(options.task, options.length)
    items = lines(world, options.split, options.n, options.seed)
    first = next(items)  # a split without items is refused before a file is opened
    try:
        with (
            open(options.out, "w", encoding="utf-8")
            if options.out
            else nullcontext(sys.stdout) as file
        ):
            file.write(first)
            file.writelines(items)
    except BrokenPipeError:  # no mistake: whoever reads has seen enough
        raise
    except OSError as error:
        fix = "choose another file with --out"
        raise UsageError(f"cannot write {options.out}: {error.strerror}; {fix}") from None
    if options.out:
        print(f"{options.out}: {options.n:,} items of up to {world.n_tokens:,} tokens, {world}")
    answer = {"out": options.out, "task": world.name, "options": options_of(world), "n": options.n}
    print_json(options.json, {**answer, "split": options.split, "seed": options.seed})
    return 0
