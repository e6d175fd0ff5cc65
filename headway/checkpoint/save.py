"""Save checkpoints: ordinary Hugging Face safetensors in one folder that is complete or absent.

    RUN/checkpoints/step-000060/
      model.safetensors      parameters and buffers under their state_dict names
      config.json            the architecture (ModelConfig)
      optimizer.safetensors  `<parameter>.exp_avg` and so on, never indices
      state.json             step, seeds, running statistics, random number generators, the mesh
      manifest.json          size and SHA-256 of each file above

The files are the same, byte for byte, whatever the mesh: every rank writes its slices to their
places in the full tensors (docs/distributed.md). A folder is written under a temporary name beside
its final one, every file and the folder are synced, and then it is renamed: a crash at any moment
leaves the previous checkpoint untouched."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headway.checkpoint import checkpoint_dir
from headway.checkpoint.checkpoint_dir import CheckpointError
from headway.checkpoint.state import model_tensors, parameter_of, rng_state
from headway.checkpoint.tensor_files import MAX_FILE_BYTES, TensorFile, index_of, plan_files
from headway.config import ModelConfig
from headway.optim.groups import Optimizers
from headway.parallel.local_shards import LocalShard, local_shard
from headway.parallel.mesh import Mesh
from headway.parallel.parallelize import SINGLE_PROCESS, Parallelism

GatherObjects = Callable[[Any], list[Any]]
"""Return every rank's value, in rank order; a barrier (`Mesh.all_gather_object`)."""


@dataclass(frozen=True)
class SavePlan:
    """A checkpoint that is ready to be written: which shards this rank writes to which files."""

    path: Path
    """The folder of the checkpoint."""
    step: int
    mesh: Mesh
    files: list[TensorFile]
    shards: Mapping[str, Iterable[LocalShard]]
    """The parts of each tensor, which may be read only as they are written."""
    json_files: dict[str, dict[str, Any]]
    """JSON files and their contents; rank 0 writes them."""
    keep: int
    keep_up_to: Sequence[int]

    def stage(self) -> "SavePlan":
        """Return a plan with copies of the tensors on the CPU, to be written beside training."""
        copies = {k: [s.to_cpu() for s in shards] for k, shards in self.shards.items()}
        return dataclasses.replace(self, shards=copies)


def plan_save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    config: ModelConfig,
    state: dict[str, Any],
    keep: int = 2,
    parallelism: Parallelism = SINGLE_PROCESS,
    keep_up_to: Sequence[int] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> SavePlan:
    """Plan `checkpoints/step-{step:06d}` for `write_checkpoint`. Collective; tensors are not
    copied. `state` is JSON-ready; the random number generators and the mesh are added to it."""
    mesh, sharding = parallelism.mesh, parallelism.sharding
    ranks = mesh.all_gather_object((rng_state(), optimizers.without_state()))
    missing = [names for _, names in ranks]
    # an expert that got no token on one mesh may have had some on another
    optimizers.add_state(set().union(*missing) - set(missing[0]).intersection(*missing))
    weights = {name: local_shard(name, x, sharding) for name, x in model_tensors(model).items()}
    moments = {
        name: local_shard(name, x, sharding, parameter_of(name))
        for name, x in optimizers.tensors().items()
    }
    json_files = {
        "config.json": _config_json(config),
        "state.json": {
            **state,
            "step": step,
            "updates": optimizers.adamw.updates,
            "mesh": mesh.sizes,
            "rng": [rng for rng, _ in ranks],
        },
    }
    files = _plan_stems({"model": weights, "optimizer": moments}, max_file_bytes, json_files)
    return SavePlan(
        checkpoint_dir.checkpoints(run_dir) / f"step-{step:06d}",
        step,
        mesh,
        files,
        {name: [shard] for name, shard in (weights | moments).items()},
        json_files,
        keep,
        keep_up_to,
    )


class WeightsInParts(Protocol):
    """Weights that come from elsewhere, each in parts that are read one at a time."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def parts(self, name: str) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Yield where each part of a tensor lies, and its values."""
        ...


@dataclass(frozen=True)
class _Shards:
    """The parts of one tensor as shards; iterating reads them."""

    weights: WeightsInParts
    name: str

    def __iter__(self) -> Iterator[LocalShard]:
        shape = self.weights.shape(self.name)
        for place, part in self.weights.parts(self.name):
            yield LocalShard(part, shape, tuple(s.start for s in place), writes=True)


def plan_weights(run_dir: Path, config: ModelConfig, weights: WeightsInParts) -> SavePlan:
    """Plan a checkpoint of step 0 for `write_checkpoint`: weights in their dtypes, optimisers that
    have not begun. No more than one part of a tensor is in memory."""
    empty = {}
    for name in weights.names():
        meta = torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta")
        empty[name] = LocalShard(meta, weights.shape(name), (0,) * meta.dim(), writes=True)
    mesh, stems = SINGLE_PROCESS.mesh, {"model": empty, "optimizer": {}}
    state = {"step": 0, "updates": 0, "mesh": mesh.sizes, "rng": []}
    json_files = {"config.json": _config_json(config), "state.json": state}
    files = _plan_stems(stems, MAX_FILE_BYTES, json_files)
    path = checkpoint_dir.checkpoints(run_dir) / "step-000000"
    shards = {name: _Shards(weights, name) for name in empty}
    return SavePlan(path, 0, mesh, files, shards, json_files, keep=1, keep_up_to=())


def write_checkpoint(plan: SavePlan, gather_objects: GatherObjects | None = None) -> Path:
    """Write the folder of a checkpoint, then remove all but the newest `plan.keep` and, for each
    step in `plan.keep_up_to`, the newest one up to that step; return its path. Collective: the
    ranks wait for one another after each stage, by default with `Mesh.all_gather_object`.

    Raises `CheckpointError` on every rank when one of them cannot write, as on a full disk; then
    nothing of this checkpoint is left and the earlier ones are untouched."""
    mesh, is_main, path = plan.mesh, plan.mesh.is_main, plan.path
    gather_objects = gather_objects or mesh.all_gather_object
    temporary, digests = checkpoint_dir.temporary(path), {}

    def create_files() -> None:
        if is_main:
            checkpoint_dir.create_temporary(path)
            for file in plan.files:
                file.create(temporary)
            for name, value in plan.json_files.items():
                checkpoint_dir.write_json(temporary / name, value)

    def write_shards() -> None:
        for file in plan.files:
            file.write(temporary, plan.shards)

    def hash_files() -> dict[str, Any]:
        names = [*(file.name for file in plan.files), *plan.json_files]
        ours = names[mesh.rank :: mesh.size]
        return {name: checkpoint_dir.digest(temporary / name) for name in ours}

    def commit() -> None:
        if is_main:
            checkpoint_dir.write_json(temporary / "manifest.json", {"files": digests})
            checkpoint_dir.commit(path)

    for stage in (create_files, write_shards, hash_files, commit):
        result, problem = None, ""
        try:
            result = stage()
        except OSError as error:
            problem = f"rank {mesh.rank}: {error}" if mesh.size > 1 else str(error)
        answers = gather_objects((problem, result))
        problem = next((text for text, _ in answers if text), "")
        if problem:
            if is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"checkpoint at step {plan.step} was not written: {problem}")
        for _, hashed in answers:
            digests |= hashed or {}
    if is_main:
        checkpoint_dir.remove_old(path.parent, plan.keep, plan.keep_up_to)
    return path


def _config_json(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "headway", **dataclasses.asdict(config)}


def _plan_stems(
    stems: dict[str, dict[str, LocalShard]], max_bytes: int, json_files: dict[str, dict[str, Any]]
) -> list[TensorFile]:
    """Return the files of several sets of tensors; add an index to `json_files` where one needs
    it."""
    files = []
    for stem, shards in stems.items():
        stem_files = plan_files(stem, shards, max_bytes)
        files += stem_files
        if len(stem_files) > 1:
            json_files[f"{stem}.safetensors.index.json"] = index_of(stem_files)
    return files
