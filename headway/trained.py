"""A trained model from its folder, ready to be evaluated or sampled."""

from pathlib import Path
from typing import NamedTuple

import torch

from headway.config import Config, UsageError
from headway.data.tokenizer import Tokenizer, load_tokenizer
from headway.model.transformer import Transformer
from headway.train import checkpoint, folder, saved
from headway.train.resolve import resolve


class Trained(NamedTuple):
    """A model with everything that is needed to use it."""

    config: Config
    """Resolved."""
    model: Transformer
    """On its device, in evaluation mode."""
    tokenizer: Tokenizer
    checkpoint: Path
    problems: list[str]
    """One sentence for each newer checkpoint that is damaged."""


def load_trained(path: str | Path) -> Trained:
    """The model of a run folder (its newest whole checkpoint), or of one checkpoint folder inside a
    run.

    Raises UsageError where there is no whole checkpoint, or no run.json above it.
    """
    path = Path(path)
    problems: list[str] = []
    if (path / "run.json").is_file():
        run_dir = path
        found, problems = folder.find_checkpoint(run_dir)
        if found is None:
            raise UsageError(
                f"{path} holds no checkpoint yet; train it first: headway train --resume {path}"
            )
    elif (path / "manifest.json").is_file() or path.name.startswith("step-"):
        run_dir, found = path.parent.parent, path
        if problem := saved.verify(path):
            raise UsageError(
                f"checkpoint {path} is damaged: {problem}; give the run folder for the one before"
            )
    else:
        raise UsageError(
            f"{path} is neither a run folder nor a checkpoint; give the --run of a `headway train`"
        )
    config = folder.read_config(run_dir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    resolved = resolve(config, tokenizer.vocab_size)
    model = Transformer(resolved.config.model, dtype=resolved.dtype)
    checkpoint.load_model(found, model)
    model.to(resolved.device).eval()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return Trained(resolved.config, model, tokenizer, found, problems)
