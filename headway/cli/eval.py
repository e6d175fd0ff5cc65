"""`headway eval`: bits per byte of a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from headway.cli import trained
from headway.cli.options import parse, print_json
from headway.cli.samples import samples
from headway.config import EngineConfig, UsageError

if TYPE_CHECKING:
    from headway.data.stream import Stream
    from headway.hub.load import LoadedModel


@dataclass(frozen=True)
class Eval(trained.TrainedOptions):
    """Bits per byte of a trained model on the validation split of its data, or of other data.

    `headway eval --samples FILE` is another command: pass@k of samples, without a model; see
    `headway eval --samples FILE --help`."""

    data: tuple[str, ...] = ()
    """Other text, as for `train --data`; its validation split is read."""
    tokens: int = 0
    """Validation tokens, in whole windows, as `run.eval_tokens`; 0 means the whole split."""
    tasks: tuple[str, ...] = ()
    """YAML files of lm-evaluation-harness with local data, or bigbench:TASK: run these instead."""
    suite: Literal["", "worlds"] = ""
    """`worlds`: accuracy on test items of the worlds that the model was trained on, or of those
    that --data names, beside what shallow guesses reach."""
    items: int | None = None
    """Items per world of --suite; 512 where nothing is said."""
    via_http: bool = False
    """Also start `headway serve` on a free port, score the same text there and show the
    difference."""


def evaluate(args: Sequence[str]) -> int:
    """Run `headway eval RUN|CHECKPOINT` and return its exit code."""
    if any(word.partition("=")[0] == "--samples" for word in args):  # needs no model
        return samples(args)
    options = parse(Eval, args, "headway eval")
    if options.items is not None and not options.suite:
        raise UsageError(f"--items {options.items} is for --suite worlds; add it, or leave it out")
    if options.tokens < 0:
        raise UsageError(f"--tokens {options.tokens} is below 0; 0 means the whole split")

    if options.tasks:
        return _tasks(options)
    if options.suite:
        return _worlds(options)

    from headway.data.shards import prepare
    from headway.data.stream import Stream
    from headway.data.validation import validation_text
    from headway.eval import bits_per_byte
    from headway.eval.token_losses import TokenLosses

    model = trained.load(options)
    data = model.config.data
    if options.data:
        other = replace(data, source=options.data, weights=())
        if data.worlds and not other.worlds:
            what = f"{options.run} was trained on worlds and has no words for {options.data[0]!r}"
            raise UsageError(f"{what}; give --data world:TASK")
        if other.worlds and not data.worlds:
            what = f"{other.worlds[0]} is no text, which {options.run} was trained on"
            raise UsageError(f"{what}; score its items with --suite worlds")
        data = other
    stream = Stream(prepare(data, model.tokenizer), data, model.config.run.seed)
    text = validation_text(stream, options.tokens)
    # other data may share documents with their validation split: the model has seen neither
    for note in stream.dataset.approximate if options.data else stream.dataset.notes:
        print(f"note: {note}")
    token_losses = TokenLosses()
    sizes = text.windows, data.micro_batch_size
    result = bits_per_byte.evaluate(model.model, stream, *sizes, token_losses=token_losses)
    print(
        f"{model.info.source}: {result.val_bits_per_byte:.4f} bits/byte, "
        f"{result.val_loss:.4f} nats/token on {text.sentence}"
    )
    assert result.calibration is not None
    for sentence in (*token_losses.sentences(), result.calibration.sentence):
        print(sentence)
    difference = {}
    if options.via_http:
        difference = _via_http(options, model, stream, text.windows)
    answer = {
        **result.numbers(),
        **difference,
        "loss_quantiles": token_losses.quantiles(),
        "loss_by_position": token_losses.by_position(),
        "calibration_error": result.calibration.error,
        "calibration": result.calibration.bins(),
        "windows": text.windows,
        "validation": text.fingerprint,
        "data": list(data.source),
        **trained.facts(model),
    }
    print_json(options.json, answer)
    return 0


def _via_http(
    options: Eval, loaded: "LoadedModel", stream: "Stream", n_windows: int
) -> dict[str, float]:
    """Return and print how a server of the same model differs."""
    from headway.eval.over_http import compare, server

    # the checkpoint itself: a run that goes on may have a newer one by now
    words = [str(loaded.info.source), "--device", options.device, "--dtype", options.dtype]
    with server([*words, "--threads", str(options.threads)]) as url:
        vocab_size = loaded.tokenizer.vocab_size
        result = compare(loaded.model, vocab_size, stream, n_windows, url)
    print(
        f"over HTTP {result.via_http_difference:+.2e} bits/byte, largest difference of a token "
        f"{result.via_http_largest:.2e} nats, of {result.via_http_tokens:,} tokens"
    )
    return result._asdict()


def _tasks(options: Eval) -> int:
    """Run tasks of lm-evaluation-harness and print their metrics."""
    if options.data or options.tokens or options.via_http or options.suite:
        others = "--data, --tokens, --suite and --via-http"
        raise UsageError(f"--tasks reads its own data; leave out {others}")
    try:
        from headway.eval.tasks import run_tasks
    except ImportError as error:
        why = f"--tasks needs {error.name}, which is not installed"
        raise UsageError(f"{why}; pip install 'headway[eval]'") from None
    from headway.serve.engine import Engine

    loaded = trained.load(options)
    # one token more than the context: the last one is read too, and only its score is needed
    engine = Engine.of(loaded, EngineConfig(max_len=loaded.info.max_len + 1))
    results = run_tasks(engine, options.tasks)
    for name, metrics in results.items():
        numbers = {k: v for k, v in metrics.items() if not isinstance(v, list)}
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    print_json(options.json, {"tasks": results, **trained.facts(loaded)})
    return 0


def _worlds(options: Eval) -> int:
    """Score the model on worlds and print accuracies beside floors."""
    if options.tokens or options.via_http:
        raise UsageError("--suite scores --items items; leave out --tokens and --via-http")
    items = 512 if options.items is None else options.items
    if items < 1:
        raise UsageError(f"--items {items} is below 1; use 1 or more")
    from headway.data.worlds.source import WorldSource
    from headway.eval.worlds import score

    loaded = trained.load(options)
    specs = options.data or loaded.config.data.source
    for spec in specs:
        if not spec.startswith("world:"):
            what = "is no world" if options.data else f"is what {options.run} was trained on"
            raise UsageError(f"--suite worlds: {spec!r} {what}; give --data world:TASK")
    results = {}
    for spec in specs:
        source = WorldSource.open(spec, loaded.tokenizer)
        result = score(loaded.model, loaded.tokenizer.vocab_size, source, items)
        guesses = ", ".join(
            f"{name.replace('_', ' ')} {value:.1%}"
            for name, value in result.floors._asdict().items()
        )
        print(
            f"{spec}: accuracy {result.accuracy:.1%} (floors: {guesses}), "
            f"items all right {result.exact:.1%}, {result.loss:.4f} nats per target"
        )
        results[spec] = result.numbers()
    print_json(options.json, {"worlds": results, **trained.facts(loaded)})
    return 0
