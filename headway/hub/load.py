"""Load a trained model for inference: a run folder, one of its checkpoints, or a Hugging Face
folder. No training option is read, and no weight is drawn: each tensor goes from disk to its final
dtype once, one at a time."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from headway.checkpoint import checkpoint_dir, run_folder
from headway.checkpoint.load import read_weights
from headway.checkpoint.runtime import Device, Dtype, Runtime, resolve_runtime
from headway.config import Config, UsageError
from headway.data.tokenizer import Tokenizer, load_tokenizer
from headway.model.build import BlockBuilder, build_block
from headway.model.compute import Compute
from headway.model.roles import stored_dtypes
from headway.model.transformer import Transformer


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a loaded model beside its weights."""

    name: str
    """Name of the folder: what a server calls the model."""
    source: Path
    """The checkpoint, or the Hugging Face folder, that was read."""
    folder: Path
    """Where the files of the tokenizer are: the run folder, or the Hugging Face folder."""
    runtime: Runtime
    problems: tuple[str, ...]
    """One sentence for each newer checkpoint that is damaged."""
    eos_ids: tuple[int, ...]
    """Ids that end a text: the tokenizer's, then those of generation_config.json."""
    bos_id: int | None
    """The id that the tokenizer's own post-processor puts before a text, if it does."""
    chat_template: str | None
    max_len: int
    """Longest context in tokens."""

    @property
    def lines(self) -> tuple[str, ...]:
        """Return what a user should know before the first token."""
        return (*(f"{p}; using the one before" for p in self.problems), *self.runtime.remarks)


class LoadedModel(NamedTuple):
    """A model with everything that is needed to use it."""

    config: Config
    """The config of the run."""
    model: Transformer
    """On its device, in evaluation mode, its weights in the dtype of the runtime."""
    tokenizer: Tokenizer
    info: ModelInfo


def load_model(
    path: str | Path,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: int = 0,
    blocks: BlockBuilder = build_block,
) -> LoadedModel:
    """Return the model of a run folder (its latest undamaged checkpoint) or of one checkpoint
    inside a run.

    Args:
        device, dtype: as for `resolve_runtime`.
        threads: CPU threads; 0 takes what the run was trained with.
        blocks: as for `Transformer`.
    Raises: UsageError where there is no undamaged checkpoint, no run.json above it, no such device,
    or where `blocks` make another model."""
    run_dir, checkpoint, problems = find_trained(Path(path))
    config = run_folder.read_config(run_dir)
    runtime = resolve_runtime(config, device, dtype)
    tokenizer = tokenizer_of(run_dir, config)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"{run_dir} has model.vocab_size={config.model.vocab_size} and the tokenizer "
            f"{config.data.tokenizer} has {tokenizer.vocab_size} ids; restore the run's tokenizer"
        )
    if threads := threads or config.run.threads:
        torch.set_num_threads(threads)
    model = _empty(config, runtime, blocks)
    read_weights(checkpoint, model, runtime.device, stored_dtypes(model, runtime.dtype))
    info = _info(run_dir, checkpoint, config, runtime, tokenizer, problems)
    return LoadedModel(config, model.eval(), tokenizer, info)


def tokenizer_of(run_dir: Path, config: Config) -> Tokenizer:
    """Return the tokenizer of a run; an imported run holds its own."""
    inside = (run_dir / "tokenizer.json").is_file()
    return load_tokenizer(str(run_dir) if inside else config.data.tokenizer)


def _empty(config: Config, runtime: Runtime, blocks: BlockBuilder) -> Transformer:
    """Return the model on the meta device."""
    moe = replace(config.model.moe, precision=runtime.precision)
    with torch.device("meta"):
        return Transformer(replace(config.model, moe=moe), Compute(runtime.dtype), blocks=blocks)


def _info(
    folder: Path,
    source: Path,
    config: Config,
    runtime: Runtime,
    tokenizer: Tokenizer,
    problems: Iterable[str] = (),
) -> ModelInfo:
    """Return the facts of a model; `folder` may hold files of the tokenizer and of generation."""
    ends = _json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return ModelInfo(
        name=folder.absolute().name,
        source=source,
        folder=folder,
        runtime=runtime,
        problems=tuple(problems),
        eos_ids=tuple(dict.fromkeys([*tokenizer.eos_ids, *ends])),
        bos_id=tokenizer.bos,
        chat_template=_chat_template(folder),
        max_len=config.model.max_len or config.data.seq_len,
    )


def _chat_template(folder: Path) -> str | None:
    """Return the chat template of a folder: its own file, or an entry of tokenizer_config.json, of
    several the one called default."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text("utf-8")
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; {} without the file."""
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}; restore it") from None


def find_trained(path: Path) -> tuple[Path, Path, list[str]]:
    """Return the run folder, the checkpoint to read and one sentence per damaged newer one."""
    if (path / "run.json").is_file():
        checkpoint, problems = run_folder.find_checkpoint(path)
        if checkpoint is None:
            fix = f"train it first: headway train --resume {path}"
            raise UsageError(f"{path} holds no checkpoint yet; {fix}")
        return path, checkpoint, problems
    if (path / "manifest.json").is_file() or path.name.startswith("step-"):
        if problem := checkpoint_dir.verify(path):
            fix = "give the run folder for the one before"
            raise UsageError(f"checkpoint {path} is damaged: {problem}; {fix}")
        return path.absolute().parent.parent, path, []
    raise UsageError(
        f"{path} is neither a run folder nor a checkpoint; give the --run of a `headway train`"
    )
