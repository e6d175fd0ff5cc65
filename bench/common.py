"""What the benches share: options, provenance, interleaved repetition, and the JSON object they end
with.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "docs" / "numbers"


def add_options(parser: argparse.ArgumentParser, data: bool = True) -> None:
    """--data (of a bench that reads a text), --json, --save."""
    if data:
        parser.add_argument(
            "--data",
            default="",
            help="text file, folder or glob; default: the standard library's sources",
        )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--save", action="store_true", help="write docs/numbers/BENCH.json")


def data_config(args: argparse.Namespace, *, seq_len: int, batch_size: int):
    """The Headway data configuration of a bench's --data."""
    from headway.config import DataConfig

    source = (args.data,) if args.data else ("stdlib",)
    return DataConfig(source=source, seq_len=seq_len, batch_size=batch_size)


def parameters(model) -> tuple[int, int]:
    """(total, active per token) parameters of a `ModelConfig`, without the embedding, which
    multiplies nothing.
    """
    from headway.config import Config
    from headway.plan.cost import model_costs, total

    table = 0 if model.tied else model.vocab_size * model.d_model
    costs = model_costs(Config(model=model), 1)
    return int(total(costs.parameters)) - table, int(total(costs.active)) - table


def run(main: Callable[[], None]) -> None:
    """Call a bench's main; a user's mistake costs one line and exit code 2."""
    from headway.config import UsageError

    try:
        main()
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def interleaved(
    rivals: dict[str, Callable[[], dict]], repetitions: int, warmup: int = 1
) -> dict[str, list[dict]]:
    """Call the rivals in turn, A B C A B C …; what each call returns, without the first `warmup`
    rounds.
    """
    kept: dict[str, list[dict]] = {name: [] for name in rivals}
    for i in range(warmup + repetitions):
        for name, call in rivals.items():
            result = call()
            if i >= warmup:
                kept[name].append(result)
    return kept


def target(name: str, value: float, bound: float, at_least: bool) -> dict:
    """One target: its value (None when it was never reached), its bound and whether it is met."""
    return {
        "name": name,
        "value": value if math.isfinite(value) else None,
        "bound": bound,
        "at_least": at_least,
        "pass": bool(value >= bound if at_least else value <= bound),
    }


def document(bench: str, rows: list[dict], targets: list[dict]) -> dict:
    """The JSON object of a bench: what was measured, where, with what."""
    from headway.report.provenance import machine, versions

    head, dirty = source()
    return {
        "bench": bench,
        "machine": machine(),
        "versions": versions(),
        "commit": head,
        "dirty": dirty,
        "rows": rows,
        "targets": targets,
    }


def source() -> tuple[str, bool]:
    """Return the commit, and whether something that computes or measures differs from it: not
    docs/, where an earlier bench has written.
    """
    from headway.report.provenance import commit

    return commit(ROOT / "headway", besides="docs")


def place(machine: dict, versions: dict) -> str:
    """Where something was measured: the GPU, or the CPU, its cores and vector path; and torch."""
    cpu = "{cpu}, {cores} cores ({cpu_capability})".format(**machine)
    return f"{machine['gpu'] or cpu}, torch {versions['torch']}"


def stamped(rows: list[dict]) -> list[dict]:
    """Rows with the commit and the place that measured them; those that an earlier call saved keep
    theirs, and have no place where they were saved without.
    """
    from headway.report.provenance import machine, versions

    now = {"commit": source()[0], "on": place(machine(), versions())}
    return [row if "commit" in row else row | now for row in rows]


def report(bench: str, rows: list[dict], targets: list[dict], args: argparse.Namespace) -> None:
    """Print the targets, save with --save, and end with the JSON object with --json. Rows that an
    earlier call saved keep their commit and place.
    """
    found = document(bench, stamped(rows), targets)
    for t in targets:
        sign = ">=" if t["at_least"] else "<="
        value = "never" if t["value"] is None else format(t["value"], ".4g")
        print(f"{'PASS' if t['pass'] else 'FAIL'}  {t['name']}: {value} ({sign} {t['bound']:g})")
    if args.save:
        write(NUMBERS / f"{bench}.json", found)
    if args.json:
        print(json.dumps(found))


def load_rows(bench: str) -> list[dict]:
    """The rows saved by an earlier call; empty when there are none."""
    path = NUMBERS / f"{bench}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def print_rows(rows: list[dict]) -> None:
    """One line per row."""
    for row in rows:
        cells = (f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(cells), flush=True)


def write(path: Path, value: dict) -> None:
    """Replace a file of numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
