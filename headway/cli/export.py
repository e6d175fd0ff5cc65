"""`headway export`: a trained model for other people's tools."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from headway.cli.options import parse, print_json


@dataclass(frozen=True)
class Export:
    """Write a trained model as a folder for Hugging Face Transformers."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or one checkpoint folder inside it."""
    to: str
    """The folder to write; it must not exist."""
    as_: Annotated[str, tyro.conf.arg(name="as", metavar="auto|headway|FAMILY")] = "auto"
    """Model type: a family that Transformers knows, where it computes the same; `headway`, which
    brings its own code; `auto`: the family it came from, or the first that computes the same."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Dtype of the weights."""
    check: bool = False
    """Compare float32 logits and greedy tokens with Transformers' reading (extra [hf]); exit code 1
    where they differ."""
    json: bool = False
    """End with one JSON object."""


def export(args: Sequence[str]) -> int:
    """Run `headway export RUN` and return its exit code."""
    options = parse(Export, args, "headway export")

    from headway.hub.check import compare
    from headway.hub.export import Source, export_hf

    to = Path(options.to)
    with Source(Path(options.run)) as source:
        for problem in source.problems:
            print(f"headway: {problem}; using the one before", file=sys.stderr)
        done = export_hf(source, to, options.dtype, options.as_)
    if done.left_out:
        names = f"{done.left_out[0]} and {len(done.left_out) - 1} more"
        print(f"headway: only training reads {names}: left out", file=sys.stderr)
    print(f"{to}: {done.model_type}, {done.bytes / 1e6:.1f} MB in {len(done.files)} files")
    answer = {
        "model_type": done.model_type,
        "format": "hf",
        "dtype": options.dtype,
        "files": done.files,
        "bytes": done.bytes,
        "left_out": done.left_out,
    }
    if not options.check:
        print_json(options.json, answer)
        return 0
    # what was rounded is compared with our own reading of it
    run = Path(options.run) if options.dtype == "float32" else to
    result = compare(to, run, own_code=done.model_type == "headway")
    print(result.sentence)
    answer["max_logit_difference"] = result.max_logit_difference
    answer["greedy_equal"] = result.greedy_equal
    print_json(options.json, answer)
    if not result.passed:
        print(f"headway: Transformers reads another model from {to}", file=sys.stderr)
    return 0 if result.passed else 1
