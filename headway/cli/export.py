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
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Dtype of the weights; those of routers and norms stay float32."""
    json: bool = False
    """End with one JSON object."""


def export(args: Sequence[str]) -> int:
    """Run `headway export RUN` and return its exit code."""
    options = parse(Export, args, "headway export")

    from headway.hub.export import export_hf, open_source

    source = open_source(Path(options.run))
    for problem in source.problems:
        print(f"headway: {problem}; using the one before", file=sys.stderr)
    exported = export_hf(source, Path(options.to), options.dtype)
    if exported.left_out:
        names = f"{exported.left_out[0]} and {len(exported.left_out) - 1} more"
        print(f"headway: only training reads {names}: left out", file=sys.stderr)
    megabytes = exported.bytes / 1e6
    print(f"{options.to}: {exported.model_type}, {megabytes:.1f} MB in {len(exported.files)} files")
    answer = {
        "model_type": exported.model_type,
        "format": "hf",
        "dtype": options.dtype,
        "files": exported.files,
        "bytes": exported.bytes,
        "left_out": exported.left_out,
    }
    print_json(options.json, answer)
    return 0
