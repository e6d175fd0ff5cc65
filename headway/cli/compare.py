"""`headway compare`: arms of equal cost, trained with the same seeds, and their differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from headway.cli.options import override, parse, print_json, recipe_names, split_words
from headway.config import Config, UsageError, leaves


@dataclass(frozen=True)
class Compare:
    """Train arms with equal budgets and the same seeds, and compare them with the first.

    An arm is a recipe, or LABEL=RECIPE:FIELD=VALUE,… . Options of the config apply to all arms.
    Runs are kept in DIR/runs and are never done twice."""

    arms: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ARM [ARM …]")]
    """Recipes, or FILE.py:FUNCTION, with a label and fields of the config."""
    baseline: str = ""
    """Label of the arm that the others are compared with; empty: the first."""
    match: str = "active-flops,total-parameters"
    """What arms have as much of as the baseline, one or two of active-flops, active-parameters,
    total-parameters, memory, traffic, step-time and cpu-time; `none` changes no sizes."""
    free: str = ""
    """Fields that are solved for it; empty: d_expert, and n_experts for a second quantity; d_ff of
    a dense arm."""
    budget: str = "400steps"
    """Of the baseline: 400steps, 20Mtokens, 1e13flops or 2cpu-min. Other arms get as many executed
    FLOPs, or CPU seconds."""
    seeds: str = "3"
    """A number of seeds from 0 on, or a list, as in 11,12,13."""
    corpus: str = ""
    """Text for all arms in place of the recipes', as `data.source`."""
    ranks: int = 8
    """Ranks that share the experts, for traffic and step time."""
    gpu: str = "h100"
    """GPU, for step time."""
    network: str = "ndr"
    """Network between nodes, for step time."""
    margin: float = 0.0
    """Bits per byte below which a difference does not matter: non-inferiority, equivalence, and the
    seeds and CPU minutes that seeing it takes; 0: none is stated."""
    eval_tokens: int = 0
    """Validation tokens, in whole windows; 0 is the whole split."""
    workers: int = 1
    """Processes, each of one thread unless run.threads says otherwise."""
    dir: str = "compare"
    """Folder of the runs and of the report."""
    json: bool = False
    """End with one JSON object."""


_OF_THE_EXPERIMENT = {
    "run.seed": "--seeds",
    "run.dir": "--dir",
    "run.eval_tokens": "--eval-tokens",
    "optim.steps": "--budget",
    "data.last_batch_size": "--budget",
    "run.max_seconds": "--budget",
}
"""Leaf that the experiment sets → the option that says how."""


def compare(args: Sequence[str]) -> int:
    """Run `headway compare ARM [ARM …]` and return its exit code."""
    verb_words, words = split_words(Compare, args)
    options = parse(Compare, verb_words, "headway compare")
    if len(options.arms) < 2:
        raise UsageError(f"compare needs two arms or more; use {recipe_names()}")
    if options.workers < 1:
        raise UsageError(f"--workers {options.workers} is below 1; use 1 or more")

    from headway.lab.compare import compare as run_comparison
    from headway.lab.compare import table
    from headway.lab.experiment import Arm, Experiment
    from headway.lab.match import Place, quantities
    from headway.lab.page import write_comparison
    from headway.train.budget import Budget

    names = [] if options.match == "none" else options.match.split(",")
    by_time = "cpu-time" in names
    matched = ",".join(name for name in names if name != "cpu-time")
    arms = [_arm(text, words, options.corpus) for text in options.arms]
    experiment = Experiment(
        arms=tuple(Arm(name, config) for name, config in arms),
        seeds=_seeds(options.seeds),
        budget=Budget.parse(options.budget),
        baseline=options.baseline,
        match=quantities(matched) if matched else (),
        free=tuple(name for name in options.free.split(",") if name),
        equal_cpu_time=by_time,
        place=Place(options.ranks, options.gpu, options.network),
        margin=options.margin,
        eval_tokens=options.eval_tokens,
    )
    root = Path(options.dir)
    comparison = run_comparison(experiment, root, workers=options.workers)
    report = write_comparison(comparison, root / "report.html")
    print(table(comparison))
    print(f"report: {report}")
    print_json(options.json, {**comparison.to_dict(), "report": str(report)})
    return 0


def _arm(text: str, words: Sequence[str], corpus: str) -> tuple[str, Config]:
    """Return the label and the config of `LABEL=RECIPE:FIELD=VALUE,…`."""
    from headway import recipes

    label, recipe, fields = _parts(text)
    config = recipes.load(recipe)
    config = override(config, words, "headway compare")
    if corpus:
        config = override(config, ["--data.source", corpus], "headway compare")
    before = leaves(recipes.load(recipe).to_dict())
    assigned = [word for field, value in fields for word in (_flag(field, [*before], text), value)]
    config = override(config, assigned, "headway compare")
    after = leaves(config.to_dict())
    for name, option in _OF_THE_EXPERIMENT.items():
        if after[name] != before[name]:
            raise UsageError(f"{name} is set by the comparison; use {option}")
    return label, config


def _parts(text: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Return label, recipe and fields of an arm."""
    head, *tail = text.split(":")
    label, _, recipe = head.rpartition("=")
    if recipe.endswith(".py") and tail:
        recipe, tail = f"{recipe}:{tail[0]}", tail[1:]
    fields = []
    for pair in filter(None, ",".join(tail).split(",")):
        field, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"arm {text!r}: {pair!r} is no FIELD=VALUE; use d_model=256")
        fields.append((field.strip(), value.strip()))
    return label or (text if fields else recipe), recipe, fields


def _flag(field: str, known: Sequence[str], text: str) -> str:
    """Return the option of a leaf, whose path may be cut off on the left."""
    from headway.lab.where import field_named

    try:
        return "--" + field_named(field, known).replace("_", "-")
    except UsageError as error:
        raise UsageError(f"arm {text!r}: {error}") from None


def _seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0 or (len(numbers) == 1 and numbers[0] < 1):
        raise UsageError(f"--seeds {text} is no number of seeds and no list; use 3 or 11,12,13")
    return tuple(numbers) if "," in text else tuple(range(numbers[0]))
