"""`headway export`: a trained model for other people's tools."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from headway.cli.options import parse, print_json
from headway.config import UsageError

if TYPE_CHECKING:
    from headway.hub.check import Comparison


@dataclass(frozen=True)
class Export:
    """Write a trained model for other tools: a folder for Hugging Face Transformers (and vLLM and
    others), or one file for llama.cpp."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, one of its checkpoints, or a Hugging Face folder."""
    to: str
    """The folder or file to write; it must not exist."""
    format: Literal["hf", "gguf"] = "hf"
    """`hf`: a Hugging Face folder. `gguf`: a file for llama.cpp (extra [gguf])."""
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

    if options.check and options.format == "gguf":
        raise UsageError("--check reads Hugging Face folders; use --format hf, or leave it out")

    from headway.hub.export import export_hf
    from headway.hub.trained import open_trained

    to, remarks = Path(options.to), []
    with open_trained(Path(options.run)) as source:
        remarks += [f"{problem}; using the one before" for problem in source.problems]
        if options.format == "hf":
            done = export_hf(source, to, options.dtype, options.as_)
        else:
            from headway.hub.gguf import export_gguf

            done, vocabulary = export_gguf(source, to, options.dtype, options.as_)
            if not vocabulary.exact:
                pattern = f"its nearest is {vocabulary.pre}, which cuts some words elsewhere"
                remarks.append(f"llama.cpp does not know how this tokenizer cuts text: {pattern}")
    if done.why:
        remarks.append(f"the folder holds code of its own, for trust_remote_code=True: {done.why}")
    if done.left_out:
        names = f"{done.left_out[0]} and {len(done.left_out) - 1} more"
        remarks.append(f"only training reads {names}: left out")
    for remark in remarks:
        print(f"headway: {remark}", file=sys.stderr)
    print(f"{to}: {done.model_type}, {done.bytes / 1e6:.1f} MB in {len(done.files)} files")
    answer = {
        "model_type": done.model_type,
        "format": options.format,
        "dtype": options.dtype,
        "files": done.files,
        "bytes": done.bytes,
        "left_out": done.left_out,
    }
    result = _check(options, done.model_type) if options.check else None
    if result is not None:
        answer["max_logit_difference"] = result.max_logit_difference
        answer["greedy_equal"] = result.greedy_equal
    print_json(options.json, answer)
    return 0 if result is None or result.passed else 1


def _check(options: Export, model_type: str) -> "Comparison":
    """Compare a folder with Transformers' reading of it, and print the result."""
    from headway.hub.check import compare

    # what was rounded is compared with our own reading of it
    run = Path(options.run if options.dtype == "float32" else options.to)
    result = compare(Path(options.to), run, own_code=model_type == "headway")
    print(result.sentence)
    if not result.passed:
        print(f"headway: Transformers reads another model from {options.to}", file=sys.stderr)
    return result
