"""`headway sweep`: the runs that a Python file asks for, trained by several processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from headway.cli.options import parse, print_json
from headway.config import UsageError


@dataclass(frozen=True)
class SweepOptions:
    """Train the runs that FILE.py asks for. Calling it again continues; other calls on the same
    folder share the work."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py")]
    """Has a generator configs(), which yields configs, or dicts with a recipe and fields."""
    dir: str = "sweep"
    """Folder of the runs (DIR/runs/HASH)."""
    workers: int = 1
    """Processes, each of which trains one run at a time."""
    threads: int = 1
    """Threads of a run, where its config does not say."""
    on: Literal["here", "ray"] = "here"
    """Where they run: on this machine, or on the nodes of a Ray cluster, which must all see DIR."""
    json: bool = False
    """End with one JSON object."""


def sweep(args: Sequence[str]) -> int:
    """Run `headway sweep FILE.py` and return its exit code: 1 where a run was given up, 2 where a
    config was invalid."""
    options = parse(SweepOptions, args, "headway sweep")
    if options.workers < 1 or options.threads < 1:
        raise UsageError(
            f"--workers {options.workers} and --threads {options.threads} must be 1 or more"
        )

    from headway.lab.sweep import Sweep

    supervisor = Sweep(Path(options.dir), options.workers, options.threads, options.on)
    summary = supervisor.run(Path(options.file))
    print(
        f"{summary['done']} runs done, {summary['failed']} given up, {summary['reused']} were there"
        f" already, in {summary['seconds']:,.0f} s; headway results {options.dir} shows them"
    )
    print_json(options.json, summary)
    return 1 if summary["failed"] else 2 if summary["invalid"] else 0
