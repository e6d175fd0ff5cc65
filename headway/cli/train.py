"""`headway train`: from the words of the command line to a run and its exit code."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from headway.checkpoint.checkpoint_dir import holds_weights_alone
from headway.checkpoint.run_folder import RunStart, is_restart, read_config, split_path
from headway.cli.options import (
    RecipeOptions,
    load_recipe,
    override,
    parse_with_config,
    print_json,
    recipe_names,
)
from headway.config import Config, UsageError, leaves
from headway.train.interrupt import Interrupt


@dataclass(frozen=True)
class Train(RecipeOptions):
    """Train a recipe, or resume a run.

    Every leaf of the config is an option too."""

    resume: Annotated[str, arg(metavar="RUN", help_behavior_hint="")] = ""
    """Resume this run, bit for bit, with its own config. Or RUN/checkpoints/STEP, together with
    --run NEW: another run, which starts from that checkpoint."""
    overwrite: bool = False
    """Clear the run that --run holds."""


def train(args: Sequence[str]) -> int:
    """Run `headway train RECIPE` or `headway train --resume RUN` and return its exit code."""
    with Interrupt() as interrupt:
        return _train(args, interrupt)


def _train(args: Sequence[str], interrupt: Interrupt) -> int:
    options, words = parse_with_config(Train, args, "headway train")
    if not options.recipe and not options.resume:
        raise UsageError(f"train needs a recipe or --resume RUN; use {recipe_names()}")
    if options.resume and options.overwrite:
        resume = f"--resume {options.resume}"
        raise UsageError(f"{resume} resumes a run and --overwrite clears it; use one")
    config, resume = _open(options, words)
    overwrite = options.overwrite and resume is None

    def log(line: str) -> None:
        try:
            print(line, flush=True)
        except OSError:  # the reader has exited, as `tee` does after Ctrl-C: save all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            interrupt.request("closed output")

    from headway import recipes
    from headway.cli.summary import train_summary
    from headway.train.loop import train as run_training

    result = run_training(
        config,
        resume=resume,
        overwrite=overwrite,
        recipe_source=recipes.source(options.recipe) if options.recipe else "",
        log=log,
        interrupt=interrupt,
    )
    print(train_summary(config, result, str(RunStart.of(config, resume, overwrite).run_dir)))
    print_json(options.json, result)
    if result["error"]:
        print(f"headway: {result['error']}", file=sys.stderr)
        return 1
    return 130 if result["interrupted"] else 0


def _open(options: Train, words: Sequence[str]) -> tuple[Config, Path | None]:
    """Return the config, and the run to resume or the checkpoint to start from. A job that torchrun
    has started again after a fault resumes the run that it had begun."""
    if options.resume:
        resume = Path(options.resume)
        config = _resumed(resume, options.recipe, words)
        if split_path(resume)[1] is not None:
            resume = _restarted(config) or resume
        return config, resume
    config = load_recipe("train", options.recipe, words)
    if resume := _restarted(config):  # its run.json has everything that was asked for
        config = _resumed(resume, "", [])
    return config, resume


def _restarted(config: Config) -> Path | None:
    """Return the run folder, when torchrun started this job again after a fault."""
    run_dir = Path(config.run_dir)
    if not is_restart(run_dir):
        return None
    print(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']} by torchrun: resume {run_dir}")
    return run_dir


_OF_THE_RUN = ("run.seed", "run.dir", "run.eval_tokens")
"""Fields of `run` that a resumed run keeps: the losses of one run are compared with each other."""
_MAY_CHANGE = ("optim.steps", "optim.spike", "optim.max_skipped", "data.micro_batch_size")


def _resumed(path: Path, recipe: str, words: Sequence[str]) -> Config:
    """Return the config of a run, with overrides of what may change within a run (`run.*`, the
    mesh, the micro-batch and the length). `path` may be a checkpoint in it, from which another run
    starts in a folder of its own."""
    from headway.hub.folder import is_hub_folder

    if is_hub_folder(path):
        first = f"headway import {path} --to RUN"
        raise UsageError(f"resume: {path} is a Hugging Face folder; import it first: {first}")
    run_dir, start = split_path(path)
    saved = read_config(run_dir)
    if recipe:
        _check_model(saved, load_recipe("train", recipe, words), run_dir)
    config = override(saved, words, f"headway train --resume {path}")
    if start is not None and config.run.dir == saved.run.dir:
        raise UsageError(
            f"resume: {path} is a checkpoint of {run_dir}, which resumes from its newest one; "
            "give the run, or another run's folder with --run"
        )
    before, after = leaves(saved.to_dict()), leaves(config.to_dict())
    new = start is not None and holds_weights_alone(start)  # nothing was trained on anything yet
    for name, value in after.items():
        free = (
            (new and not name.startswith(("model.", "data.tokenizer")))
            or name.startswith("mesh.")
            or name in _MAY_CHANGE
            or (name.startswith("run.") and name not in _OF_THE_RUN)
            or (name == "run.dir" and start is not None)
        )
        if value != before[name] and not free:
            fix = (
                f"leave --run out, or resume one of {run_dir}/checkpoints/ for a run of its own"
                if name == "run.dir"
                else "leave it out, or start another run with --run"
            )
            raise UsageError(
                f"resume: {name} is {before[name]} in {run_dir} and {value} here; {fix}"
            )
    return config


def _check_model(saved: Config, wanted: Config, run_dir: Path) -> None:
    """Raise UsageError that names the first field in which the architectures differ."""
    before, after = leaves(saved.to_dict()["model"]), leaves(wanted.to_dict()["model"])
    for name, value in after.items():
        open_vocab = name == "vocab_size" and value == 0
        if value != before[name] and not open_vocab:
            raise UsageError(
                f"resume: model.{name} is {before[name]} in {run_dir} and {value} in recipe "
                f"{wanted.recipe}; leave the recipe out, or start another run with --run"
            )
