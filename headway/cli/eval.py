"""`headway eval`: bits per byte of a trained model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from headway.cli import trained
from headway.cli.options import parse, print_json
from headway.config import UsageError


@dataclass(frozen=True)
class Eval(trained.TrainedOptions):
    """Bits per byte of a trained model on the validation split of its data, or of other data."""

    data: tuple[str, ...] = ()
    """Other text, as for `train --data`; its validation split is read."""
    tokens: int = 0
    """Validation tokens, in whole windows, as `run.eval_tokens`; 0 means the whole split."""


def evaluate(args: Sequence[str]) -> int:
    """Run `headway eval RUN|CHECKPOINT` and return its exit code."""
    options = parse(Eval, args, "headway eval")
    if options.tokens < 0:
        raise UsageError(f"--tokens {options.tokens} is below 0; 0 means the whole split")

    from headway.data.shards import prepare
    from headway.data.stream import Stream
    from headway.data.validation import validation_text
    from headway.eval import bits_per_byte

    model = trained.load(options)
    data = model.config.data
    if options.data:
        data = replace(data, source=options.data, weights=())
    stream = Stream(prepare(data, model.tokenizer), data, model.config.run.seed)
    text = validation_text(stream, options.tokens)
    # other data may share documents with their validation split: the model has seen neither
    for note in stream.dataset.approximate if options.data else stream.dataset.notes:
        print(f"note: {note}")
    result = bits_per_byte.evaluate(model.model, stream, text.windows, data.micro_batch_size)
    print(
        f"{model.info.source}: {result.val_bits_per_byte:.4f} bits/byte, "
        f"{result.val_loss:.4f} nats/token on {text.sentence}"
    )
    answer = {
        **asdict(result),
        "windows": text.windows,
        "validation": text.fingerprint,
        "data": list(data.source),
        **trained.facts(model),
    }
    print_json(options.json, answer)
    return 0
