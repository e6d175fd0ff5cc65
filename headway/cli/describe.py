"""`headway describe`: what a config costs, by formulas."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headway.cli.options import RecipeOptions, load_recipe, parse_with_config, print_json
from headway.config import EngineConfig, UsageError


@dataclass(frozen=True)
class Describe(RecipeOptions):
    """Parameters, FLOPs, memory and traffic of a recipe or of a trained model (RUN in place of
    RECIPE), each with its formula; with --decode what a decoding step reads, of a trained model
    with the routes that its own texts take.

    Every leaf of the config is an option too; `--json` then ends with one object that has every
    formula."""

    P: int = 8
    """Ranks that share the experts, for the bytes they send; 2 or more."""
    decode: bool = False
    """Bytes and least time of a decoding step instead."""
    batch: str = "1,4,16,64"
    """With --decode: sequences that decode at once, a list."""
    context: int = 0
    """With --decode: positions that each of them holds."""
    bandwidth: float = 0.0
    """With --decode: what memory is read with, in GB/s; 0 measures one thread."""


def describe(args: Sequence[str]) -> int:
    """Run `headway describe RECIPE|RUN [--P 8] [--decode]`; return its exit code."""
    from headway.recipes import RECIPES

    options, words = parse_with_config(Describe, args, "headway describe")
    # a folder may have the name of a recipe
    is_trained = options.recipe not in ("", *RECIPES) and Path(options.recipe).is_dir()
    if is_trained and words:
        raise UsageError(f"{words[0]} changes a recipe, and {options.recipe} is a trained model")
    if is_trained and options.decode:
        return _decode_run(options)
    if is_trained:
        from headway.hub.trained import open_trained

        with open_trained(Path(options.recipe)) as model:
            config = model.config
    else:
        config = load_recipe("describe", options.recipe, words)

    import torch

    from headway.config.check import validate
    from headway.config.power import powered
    from headway.data.tokenizer import load_tokenizer
    from headway.model.transformer import Transformer
    from headway.optim.transfer import derivation
    from headway.plan import describe as formulas
    from headway.plan.decode import decode_costs

    derived = validate(config)
    config, more = powered(config)
    derived |= more
    config = formulas.with_vocab(config, load_tokenizer(config.data.vocabulary).vocab_size)
    if options.decode:
        dtype = torch.bfloat16 if config.run.dtype == "bfloat16" else torch.float32
        bandwidth = _bandwidth(options)
        rows = decode_costs(config, _batches(options), dtype, bandwidth, options.context)
        return _print_decode(options, rows, bandwidth, dtype)
    with torch.device("meta"):
        derived |= derivation(Transformer(config.model), config.optim)
    costs = formulas.describe(config, options.P, 2 if config.run.dtype == "bfloat16" else 4)
    print(formulas.format_description(costs, config, derived))
    print_json(options.json, costs)
    return 0


def _decode_run(options: Describe) -> int:
    """Describe decoding of a trained model, with the experts that its own texts touch."""
    from headway.eval.touched import experts_touched
    from headway.hub.load import load_model
    from headway.model.roles import matrix_dtype
    from headway.plan.decode import decode_costs
    from headway.serve.engine import Engine

    batches, bandwidth = _batches(options), _bandwidth(options)
    loaded = load_model(options.recipe)
    model = loaded.model
    most, measured = max(batches), None
    if model.sparse_layers():
        sizes = EngineConfig(max_len=64, max_requests=most, max_batch_tokens=most + 64)
        engine = Engine.of(loaded, sizes)
        measured = {batch: experts_touched(engine, batch) for batch in batches}
    config, dtype = loaded.config, model.dtype
    sizes = (bandwidth, options.context, measured)
    rows = decode_costs(config, batches, dtype, *sizes, weights=matrix_dtype(model))
    return _print_decode(options, rows, bandwidth, dtype)


def _print_decode(options: Describe, rows: list[dict], bandwidth: float, dtype: object) -> int:
    from headway.plan.decode import format_decode

    print(format_decode(rows, bandwidth))
    name = str(dtype).removeprefix("torch.")
    print_json(options.json, {"dtype": name, "bandwidth": bandwidth, "batches": rows})
    return 0


def _batches(options: Describe) -> list[int]:
    try:
        return [int(word) for word in options.batch.split(",")]
    except ValueError:
        raise UsageError(f"--batch {options.batch} is no list of numbers; use 1,16") from None


def _bandwidth(options: Describe) -> float:
    """Return bytes per second."""
    if options.context < 0 or not 0 <= options.bandwidth < float("inf"):
        what = f"--context {options.context} and --bandwidth {options.bandwidth}"
        raise UsageError(f"{what} must be 0 or more")
    from headway.plan.decode import read_bandwidth

    return options.bandwidth * 1e9 or read_bandwidth()
