"""`headway describe`: what a config costs, by formulas."""

from collections.abc import Sequence
from dataclasses import dataclass

from headway.cli.options import RecipeOptions, load_recipe, parse_with_config, print_json


@dataclass(frozen=True)
class Describe(RecipeOptions):
    """Parameters, FLOPs, memory and traffic of a recipe, each with its formula.

    Every leaf of the config is an option too; `--json` then ends with one object that has every
    formula."""

    P: int = 8
    """Ranks that share the experts, for the bytes they send; 2 or more."""


def describe(args: Sequence[str]) -> int:
    """Run `headway describe RECIPE [--P 8]` and return its exit code."""
    options, words = parse_with_config(Describe, args, "headway describe")
    config = load_recipe("describe", options.recipe, words)

    from headway.config.check import validate
    from headway.data.tokenizer import load_tokenizer
    from headway.plan import describe as formulas

    derived = validate(config)
    config = formulas.with_vocab(config, load_tokenizer(config.data.tokenizer).vocab_size)
    costs = formulas.describe(config, options.P, 2 if config.run.dtype == "bfloat16" else 4)
    print(formulas.format_description(costs, config, derived))
    print_json(options.json, costs)
    return 0
