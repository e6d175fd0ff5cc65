"""`headway doctor`: show this machine, or measure it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headway.cli.options import parse, print_json


@dataclass(frozen=True)
class Doctor:
    """Show hardware, the kernels that will run and why, and missing extras."""

    measure: str = ""
    """Measure this machine instead, for `headway plan --machine FILE`: matmuls, experts, attention,
    memory and, under torchrun, the network. The file to write."""
    json: bool = False
    """End with one JSON object."""


def doctor(args: Sequence[str]) -> int:
    """Run `headway doctor` and return its exit code."""
    options = parse(Doctor, args, "headway doctor")
    if options.measure:
        from headway.measure.rates import measure_machine

        rates = measure_machine(Path(options.measure), lambda line: print(line, flush=True))
        if os.environ.get("RANK", "0") == "0":
            print(f"{options.measure}: use it with `headway plan RECIPE --gpus N --machine FILE`")
            print_json(options.json, rates)
        return 0

    from headway.cli.examine import examine, render

    facts = examine()
    print(render(facts))
    print_json(options.json, facts)
    return 0
