"""`headway describe`: from the words of the command line to what a config costs."""

from headway.cli.options import override, print_json, take, take_switch
from headway.cli.train import recipe_names, recipe_word
from headway.config import UsageError

HELP = """usage: headway describe RECIPE [--P N] [options of the config]

  --P N               ranks that share the experts, for the bytes they send; 2 or more, default 8
  --json              end with one JSON object that has every formula
"""


def describe(args: list[str]) -> int:
    """`headway describe RECIPE [--P 8]`; other options are those of the config."""
    if {"--help", "-h"} & set(args):
        print(HELP)
        return 0
    as_json, args = take_switch(args, "--json")
    ranks, args = take(args, "--P")
    recipe, args = recipe_word(args)
    if recipe is None:
        raise UsageError(f"describe needs a recipe; use {recipe_names()}")
    if ranks is not None and not ranks.isdecimal():
        raise UsageError(f"--P {ranks} is no number of ranks; use 2 or more")

    from headway import recipes
    from headway.config.check import validate
    from headway.data.tokenizer import load_tokenizer
    from headway.plan import describe as formulas

    config = override(recipes.load(recipe), args, f"headway describe {recipe}")
    derived = validate(config)
    config = formulas.with_vocab(config, load_tokenizer(config.data.tokenizer).vocab_size)
    found = formulas.describe(config, int(ranks or 8), 2 if config.run.dtype == "bfloat16" else 4)
    print(formulas.render(found, config, derived))
    print_json(as_json, found)
    return 0
