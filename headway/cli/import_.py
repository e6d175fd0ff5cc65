"""`headway import`: a run folder from a Hugging Face folder."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from headway.cli.options import parse, print_json
from headway.config import UsageError


@dataclass(frozen=True)
class Import:
    """Make a run folder, which every verb reads, of a Hugging Face folder with safetensors. Every
    tensor is accounted for; no code of the folder is run."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A Hugging Face folder on this machine."""
    to: str
    """The run folder to write; must not exist."""
    check: bool = False
    """Compare float32 logits and greedy tokens with Transformers (extra [hf]); exit code 1 where
    they differ."""
    json: bool = False
    """End with one JSON object."""


def import_(args: Sequence[str]) -> int:
    """Run `headway import DIR --to OUT` and return its exit code."""
    options = parse(Import, args, "headway import")

    from headway.hub.check import compare
    from headway.hub.folder import read_json
    from headway.hub.import_model import import_model

    source, out = Path(options.folder), Path(options.to)
    if options.check and read_json(source / "config.json").get("model_type") == "headway":
        raise UsageError(
            f"--check would run the code of {source}, which import never does; leave it out "
            "(headway export --check compares what it writes)"
        )
    done = import_model(source, out)
    print(
        f"{done.family}: {done.parameters:,} parameters, {done.active_parameters:,} active, from "
        f"{done.tensors_read} tensors → {out}"
    )
    for name in done.skipped:
        print(f"left out: {name} (multi-token prediction)")
    answer = {**asdict(done), "skipped": list(done.skipped)}
    result = compare(source, out) if options.check else None
    if result is not None:
        print(result.sentence)
        difference, equal = result.max_logit_difference, result.greedy_equal
        answer |= {"max_logit_difference": difference, "greedy_equal": equal}
    print_json(options.json, answer)
    if result is not None and not result.passed:
        print(f"headway: {out} does not compute what Transformers does", file=sys.stderr)
        return 1
    return 0
