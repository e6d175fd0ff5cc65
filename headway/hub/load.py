"""Load a trained model for inference: a run folder, one of its checkpoints, or a Hugging Face
folder. No training option is read, and no weight is drawn: each tensor goes from disk to its final
dtype once, one at a time."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from headway.checkpoint import checkpoint_dir, run_folder
from headway.checkpoint.load import Weights, read_weights
from headway.checkpoint.runtime import Device, Dtype, Runtime, resolve_runtime
from headway.checkpoint.tensor_reader import TensorReader
from headway.config import Config, UsageError
from headway.config.check import check_axes
from headway.data.tokenizer import Tokenizer, load_tokenizer
from headway.hub.folder import HubFolder, is_hub_folder, read_json
from headway.hub.tokenizer_files import load_hub_tokenizer
from headway.model.build import BlockBuilder, build_block
from headway.model.compute import Compute
from headway.model.packing import pack_
from headway.model.roles import stored_dtypes
from headway.model.transformer import Transformer
from headway.parallel.mesh import Mesh
from headway.parallel.parallelize import SINGLE_PROCESS
from headway.parallel.placement import partition


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
    mesh: Mesh = Mesh(),
) -> LoadedModel:
    """Return the model of a run folder (its latest undamaged checkpoint), of one checkpoint inside
    a run, or of a Hugging Face folder, packed for inference.

    Args:
        device, dtype: as for `resolve_runtime`.
        threads: CPU threads; 0 takes what the run was trained with.
        blocks: as for `Transformer`.
        mesh: of ranks that hold the same tokens; this one reads its heads and experts alone.
    Raises: UsageError where there is no undamaged checkpoint, no run.json above it, no such device,
    where `blocks` make another model or the mesh does not divide it; for a Hugging Face folder as
    `HubFolder`."""
    folder = Path(path)
    if is_hub_folder(folder):
        with HubFolder(folder) as weights:
            tokenizer = load_hub_tokenizer(folder)
            config = weights.run_config(str(folder.absolute()))
            return _load(folder, weights, config, tokenizer, device, dtype, threads, blocks, mesh)
    run_dir, checkpoint, problems = find_trained(folder)
    config = run_folder.read_config(run_dir)
    tokenizer = tokenizer_of(run_dir, config)
    with TensorReader(checkpoint, "model") as weights:
        loaded = _load(run_dir, weights, config, tokenizer, device, dtype, threads, blocks, mesh)
    info = replace(loaded.info, source=checkpoint, problems=tuple(problems))
    return loaded._replace(info=info)


def _load(
    folder: Path,
    weights: Weights,
    config: Config,
    tokenizer: Tokenizer,
    device: Device,
    dtype: Dtype,
    threads: int,
    blocks: BlockBuilder,
    mesh: Mesh,
) -> LoadedModel:
    """Build the model on the meta device, read its weights and pack them."""
    if config.model.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"{folder} has a model of vocab_size={config.model.vocab_size} and a tokenizer of "
            f"{tokenizer.vocab_size} ids; restore the model's tokenizer"
        )
    runtime = resolve_runtime(config, device, dtype)
    if threads := threads or config.run.threads:
        torch.set_num_threads(threads)
    moe = replace(config.model.moe, precision=runtime.precision)
    with torch.device("meta"):
        model = Transformer(replace(config.model, moe=moe), Compute(runtime.dtype), blocks=blocks)
    sharding, dtypes = SINGLE_PROCESS.sharding, stored_dtypes(model, runtime.dtype)
    if mesh.size > 1:
        check_axes(config.model.moe, mesh.config)
        sharding = partition(model, mesh)
    read_weights(weights, model, runtime.device, dtypes, sharding)
    pack_(model, runtime.dtype)
    info = _info(folder, config, runtime, tokenizer)
    return LoadedModel(config, model.eval(), tokenizer, info)


def tokenizer_of(run_dir: Path, config: Config) -> Tokenizer:
    """Return the tokenizer of a run; an imported run holds its own."""
    inside = (run_dir / "tokenizer.json").is_file()
    return load_tokenizer(str(run_dir) if inside else config.data.tokenizer)


def _info(folder: Path, config: Config, runtime: Runtime, tokenizer: Tokenizer) -> ModelInfo:
    """Return the facts of a model; `folder` may hold files of the tokenizer and of generation."""
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return ModelInfo(
        name=folder.absolute().name,
        source=folder,
        folder=folder,
        runtime=runtime,
        problems=(),
        eos_ids=tuple(dict.fromkeys([*tokenizer.eos_ids, *ends])),
        bos_id=tokenizer.bos,
        chat_template=chat_template_of(folder),
        max_len=config.model.max_len or config.data.seq_len,
    )


def chat_template_of(folder: Path) -> str | None:
    """Return the chat template of a folder: its own file, or an entry of tokenizer_config.json, of
    several the one called default."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text("utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


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
        f"{path} is neither a run folder, nor a checkpoint, nor a Hugging Face folder; give the "
        "--run of a `headway train`"
    )
