"""`headway sample`: text from a trained model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from headway.cli import trained
from headway.cli.options import parse, print_json


@dataclass(frozen=True)
class Sample(trained.SamplingOptions):
    """Text from a trained model, streamed as it is written."""

    prompt: str = ""
    """Where the text starts; empty starts a document."""


def sample(args: Sequence[str]) -> int:
    """Run `headway sample RUN` and return its exit code."""
    options = parse(Sample, args, "headway sample")

    from headway.eval.copying import repeated
    from headway.eval.text import generate

    params = options.params()
    model = trained.load(options)
    if factor := model.config.model.moe.capacity_factor:
        note = f"trained with model.moe.capacity_factor={factor}; sampling drops no token"
        print(f"note: {note}", file=sys.stderr)

    show = partial(print, end="", flush=True)
    show(options.prompt)
    begin = perf_counter()
    ends = model.info.eos_ids
    reply = generate(model.model, model.tokenizer, options.prompt, params, show, ends)
    seconds = perf_counter() - begin
    print()
    answer = {
        "prompt": options.prompt,
        "text": reply.text,
        "tokens": len(reply.tokens),
        "repeated": repeated(reply.tokens),
        "tokens_per_second": len(reply.tokens) / seconds,
        "seed": options.seed,
        **trained.facts(model),
    }
    print_json(options.json, answer)
    return 0
