"""Load a trained model for inference: a run folder, one of its checkpoints, or a Hugging Face
folder. No training option is read, and no weight is drawn: each tensor goes from disk to its final
dtype once, one at a time."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from headway.checkpoint.load import read_weights
from headway.checkpoint.runtime import Device, Dtype, Runtime, resolve_runtime
from headway.config import Config
from headway.config.check import check_axes
from headway.data.tokenizer import Tokenizer
from headway.hub.folder import read_json
from headway.hub.trained import Trained, open_trained
from headway.kernels.packed import packs_narrow
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
    """On its device, in evaluation mode, its weights in the dtype of the runtime, or in bfloat16 as
    they are stored (`kernels.packed.packs_narrow`)."""
    tokenizer: Tokenizer
    info: ModelInfo


def load_model(
    path: str | Path,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: int = 0,
    blocks: BlockBuilder = build_block,
    mesh: Mesh = Mesh(),
    packed: bool = True,
) -> LoadedModel:
    """Return the model of a run folder (its latest undamaged checkpoint), of one checkpoint inside
    a run, or of a Hugging Face folder.

    Args:
        device, dtype: as for `resolve_runtime`.
        threads: CPU threads; 0 takes what the run was trained with.
        blocks: as for `Transformer`.
        mesh: of ranks that hold the same tokens; this one reads its heads and experts alone.
        packed: repack weights for inference, after which they have no gradients.
    Raises: UsageError as `open_trained`; where there is no such device, `blocks` make another model
    or the mesh does not divide it."""
    with open_trained(Path(path)) as trained:
        config = trained.config
        runtime = resolve_runtime(config, device, dtype)
        if threads := threads or config.run.threads:
            torch.set_num_threads(threads)
        model = _read(trained, runtime, blocks, mesh, packed)
        if packed:
            pack_(model, runtime.dtype)
        return LoadedModel(config, model.eval(), trained.tokenizer, _info(trained, runtime))


def _read(
    trained: Trained, runtime: Runtime, blocks: BlockBuilder, mesh: Mesh, packed: bool
) -> Transformer:
    """Build the model on the meta device and read its weights, or this rank's part of them."""
    config = trained.config.model
    moe = replace(config.moe, precision=runtime.precision)
    with torch.device("meta"):
        model = Transformer(replace(config, moe=moe), Compute(runtime.dtype), blocks=blocks)
    sharding, dtypes = SINGLE_PROCESS.sharding, stored_dtypes(model, runtime.dtype)
    if packed and packs_narrow(runtime.device, runtime.dtype):
        known = trained.weights.names()
        for name, narrow in stored_dtypes(model, torch.bfloat16).items():
            if narrow is torch.bfloat16 and name in known:
                stored = trained.weights.dtype(name)
                dtypes[name] = narrow if stored is narrow else dtypes[name]
    if mesh.size > 1:
        check_axes(config.moe, mesh.config)
        sharding = partition(model, mesh)
    read_weights(trained.weights, model, runtime.device, dtypes, sharding)
    return model


def _info(trained: Trained, runtime: Runtime) -> ModelInfo:
    """Return the facts of a model; its folder may hold files of the tokenizer and of generation."""
    folder, tokenizer = trained.folder, trained.tokenizer
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return ModelInfo(
        name=folder.absolute().name,
        source=trained.source,
        folder=folder,
        runtime=runtime,
        problems=trained.problems,
        eos_ids=tuple(dict.fromkeys([*tokenizer.eos_ids, *ends])),
        bos_id=tokenizer.bos,
        chat_template=chat_template_of(folder),
        max_len=trained.max_len,
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
