"""`headway train`: from the words of the command line to a run and its exit code."""

import os
import sys
from pathlib import Path

from headway.cli.options import SHORTHANDS, override, print_json, take, take_switch
from headway.config import Config, UsageError, leaves
from headway.train.interrupt import Interrupt


def train(args: list[str]) -> int:
    """`headway train RECIPE` or `headway train --resume RUN`; options are those of the config."""
    with Interrupt() as interrupt:
        return _train(args, interrupt)


def _train(args: list[str], interrupt: Interrupt) -> int:
    as_json, args = take_switch(args, "--json")
    overwrite, args = take_switch(args, "--overwrite")
    resume, args = take(args, "--resume")
    recipe, args = recipe_word(args)
    if recipe is None and resume is None:
        if args and args[0] in ("--help", "-h"):
            print(_train_help())
            return 0
        raise UsageError(f"train needs a recipe or --resume RUN; use {recipe_names()}")
    if resume is not None and overwrite:
        raise UsageError(f"--resume {resume} goes on with a run and --overwrite clears it; use one")
    if {"--help", "-h"} & set(args):
        print(_train_help())

    from headway import recipes
    from headway.checkpoint.run_folder import Opening, split
    from headway.config.check import remarks, validate

    base = recipes.load(recipe) if recipe is not None else None
    if resume is None and base is not None:
        resume = _restarted(override(base, args, f"headway train {recipe}"))
        if resume is not None:  # everything that was asked for is in its run.json
            base, args, overwrite = None, [], False
    if resume is not None:
        config = _resumed(Path(resume), base, args)
        if split(Path(resume))[1] is not None:  # which torchrun may start again, too
            resume = _restarted(config) or resume
    else:
        assert base is not None
        config = override(base, args, f"headway train {recipe}")
    derived = validate(config)
    if resume is None:
        for name, sentence in derived.items():
            print(f"{name} = {sentence}")
    for remark in remarks(config):
        print(f"note: {remark}")

    def say(line: str) -> None:
        try:
            print(line, flush=True)
        except OSError:  # whoever read it is gone, as `tee` after Ctrl-C: saving goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            interrupt.request("closed output")

    from headway.config import RunError
    from headway.train.loop import train as run_training

    path = None if resume is None else Path(resume)
    try:
        result = run_training(
            config,
            resume=path,
            overwrite=overwrite,
            recipe_source="" if recipe is None else recipes.source(recipe),
            log=say,
            interrupt=interrupt,
        )
    except RunError as error:
        if str(error):
            print(f"headway: {error}", file=sys.stderr)
        return 1
    from headway.cli.summary import train_summary

    print(train_summary(config, result, str(Opening.of(config, path, overwrite).run_dir)))
    print_json(as_json, result)
    if result["error"]:
        print(f"headway: {result['error']}", file=sys.stderr)
        return 1
    return 130 if result["interrupted"] else 0


def _restarted(config: Config) -> str | None:
    """The run folder, when torchrun started this job again after a fault."""
    from headway.checkpoint.run_folder import restarted

    run_dir = config.run_dir
    if not restarted(Path(run_dir)):
        return None
    print(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']} by torchrun: resume {run_dir}")
    return run_dir


_OF_THE_RUN = ("run.seed", "run.dir", "run.eval_tokens")
"""Of `run.*`, what stays: the losses of one run are to be compared with each other."""
_MAY_CHANGE = ("optim.steps", "optim.spike", "optim.max_skipped", "data.micro_batch_size")


def _resumed(path: Path, recipe: Config | None, args: list[str]) -> Config:
    """The config of a run, with overrides of what may change within a run (`run.*`, the
    mesh, the micro-batch and the length). From a checkpoint in it another run goes on, in a folder
    of its own."""
    from headway.checkpoint.run_folder import read_config, split

    run_dir, start = split(path)
    saved = read_config(run_dir)
    if recipe is not None:
        _same_model(saved, override(recipe, args, f"headway train {recipe.recipe}"), run_dir)
    config = override(saved, args, f"headway train --resume {path}")
    if start is not None and config.run.dir == saved.run.dir:
        raise UsageError(
            f"resume: {path} is a checkpoint of {run_dir}, which goes on from its newest one; "
            "give the run, or another run's folder with --run"
        )
    before, after = leaves(saved.to_dict()), leaves(config.to_dict())
    for name, value in after.items():
        free = (
            name.startswith("mesh.")
            or name in _MAY_CHANGE
            or (name.startswith("run.") and name not in _OF_THE_RUN)
            or (name == "run.dir" and start is not None)
        )
        if value != before[name] and not free:
            raise UsageError(
                f"resume: {name} is {before[name]} in {run_dir} and {value} here; "
                "leave it out, or start another run with --run"
            )
    return config


def _same_model(saved: Config, wanted: Config, run_dir: Path) -> None:
    """Raise UsageError naming the first field in which the architectures differ."""
    before, after = leaves(saved.to_dict()["model"]), leaves(wanted.to_dict()["model"])
    for name, value in after.items():
        open_vocab = name == "vocab_size" and value == 0
        if value != before[name] and not open_vocab:
            raise UsageError(
                f"resume: model.{name} is {before[name]} in {run_dir} and {value} in recipe "
                f"{wanted.recipe}; leave the recipe out, or start another run with --run"
            )


def recipe_word(args: list[str]) -> tuple[str | None, list[str]]:
    """(the recipe, the other words): the first word, unless it is an option."""
    if args and not args[0].startswith("-"):
        return args[0], args[1:]
    return None, args


def recipe_names() -> str:
    from headway.recipes import RECIPES

    return f"{', '.join(RECIPES)}, or FILE.py:FUNCTION"


def _train_help() -> str:
    short = "\n".join(f"  {short:<20} {leaf}" for short, leaf in SHORTHANDS.items())
    return (
        "usage: headway train RECIPE [options]\n       headway train --resume RUN [options]\n\n"
        f"recipes: {recipe_names()}\n\n"
        f"short for\n{short}\n  {'--mesh hp=2,ep=2':<20} --mesh.hp 2 --mesh.ep 2\n\n"
        "  --resume RUN         go on with a run, bit for bit; its own config is used\n"
        "  --resume RUN/checkpoints/STEP --run NEW\n"
        "                       another run that goes on from that checkpoint\n"
        "  --overwrite          clear the run that --run holds\n"
        "  --json               end with one JSON object\n\n"
        "Every leaf of the config is an option: `headway train RECIPE --help` lists them.\n"
    )
