"""`headway sample`: text from a trained model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from headway.cli import trained
from headway.cli.options import parse, print_json
from headway.config import UsageError


@dataclass(frozen=True)
class Sample(trained.TrainedOptions):
    """Text from a trained model, streamed as it is written."""

    prompt: str = ""
    """Where the text starts; empty starts a document."""
    tokens: int = 200
    """Most tokens to write; fewer when the document ends."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Then from the smallest set whose probability reaches p; 1 keeps all."""
    seed: int = 0
    """The same seed gives the same text."""


def sample(args: Sequence[str]) -> int:
    """Run `headway sample RUN` and return its exit code."""
    options = parse(Sample, args, "headway sample")

    from headway.serve.params import SamplingParams
    from headway.serve.text import generate

    if options.tokens < 1:
        raise UsageError(f"--tokens {options.tokens} is below 1; use 1 or more")
    params = SamplingParams(
        max_tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    params.check_values()
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
        "tokens_per_second": len(reply.tokens) / seconds,
        "seed": options.seed,
        **trained.facts(model),
    }
    print_json(options.json, answer)
    return 0
