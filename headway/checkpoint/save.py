"""Checkpoints: ordinary Hugging Face safetensors in one folder that is complete or is not there.

    RUN/checkpoints/step-000060/
      model.safetensors      parameters and buffers under their state_dict names
      config.json            the architecture (ModelConfig)
      optimizer.safetensors  `<parameter>.exp_avg` and so on, never indices
      state.json             step, seeds, running statistics, random number generators, the mesh
      manifest.json          size and SHA-256 of each file above

The same files, byte for byte, whatever the mesh: every rank writes its slices in their places of
whole tensors, and reads the slices that another mesh needs (docs/distributed.md). A folder is
written under a temporary name beside its final one, every file and the folder are synced, and then
it is renamed: a crash at any moment leaves the previous checkpoint untouched.
"""

import base64
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headway.checkpoint import checkpoint_dir as saved
from headway.checkpoint.checkpoint_dir import CheckpointError
from headway.checkpoint.tensor_files import LARGEST, TensorFile, TensorReader, index, plan
from headway.config import ModelConfig, UsageError, from_dict, leaves
from headway.optim.groups import Optimizers
from headway.parallel.local_shards import LocalShard, local_shard, local_slices
from headway.parallel.parallelize import SINGLE_PROCESS, Parallelism
from headway.parallel.placement import Sharding, to_local

Collect = Callable[[Any], list[Any]]
"""Every rank's value, in rank order; waits for all ranks."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is ready to be written: what each rank will write of which files."""

    final: Path
    step: int
    rank: int
    size: int
    files: list[TensorFile]
    pieces: dict[str, LocalShard]
    texts: dict[str, dict[str, Any]]
    """JSON files and their contents; rank 0 writes them."""
    keep: int
    up_to: Sequence[int]

    def copied(self) -> "Snapshot":
        """With tensors of its own, so that training may go on while it is written."""
        return dataclasses.replace(self, pieces={k: p.to_cpu() for k, p in self.pieces.items()})


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    config: ModelConfig,
    state: dict[str, Any],
    keep: int = 2,
    parallelism: Parallelism = SINGLE_PROCESS,
    up_to: Sequence[int] = (),
) -> Path:
    """Writes `checkpoints/step-{step:06d}`, then removes all but the newest `keep` and, for each
    step in `up_to`, the newest one up to there; returns its path. Collective.

    `state` is JSON-ready; the random number generators and the mesh are added to it. Raises
    `CheckpointError` on every rank when one of them cannot write, as on a full disk; then nothing
    of this checkpoint is left and the earlier ones are untouched.
    """
    snapshot = take(run_dir, step, model, optimizers, config, state, keep, parallelism, up_to)
    return write(snapshot, parallelism.mesh.all_gather_object)


def take(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    config: ModelConfig,
    state: dict[str, Any],
    keep: int = 2,
    parallelism: Parallelism = SINGLE_PROCESS,
    up_to: Sequence[int] = (),
    largest: int = LARGEST,
) -> Snapshot:
    """What `write` will write; arguments as for `save`, `largest` bytes of tensors in a file.
    Collective; tensors are not copied."""
    mesh, sharding = parallelism.mesh, parallelism.sharding
    found = mesh.all_gather_object((_rng_state(), optimizers.without_state()))
    missing = [names for _, names in found]
    # an expert that got no token on one mesh may have had some on another
    optimizers.add_state(set().union(*missing) - set(missing[0]).intersection(*missing))
    weights = {name: local_shard(name, x, sharding) for name, x in _model_tensors(model).items()}
    moments = {
        name: local_shard(name, x, sharding, _parameter_of(name))
        for name, x in optimizers.tensors().items()
    }
    texts = {
        "config.json": {"model_type": "headway", **dataclasses.asdict(config)},
        "state.json": {
            **state,
            "step": step,
            "updates": optimizers.adamw.updates,
            "mesh": mesh.sizes,
            "rng": [random for random, _ in found],
        },
    }
    files = []
    for stem, pieces in (("model", weights), ("optimizer", moments)):
        made = plan(stem, pieces, largest)
        files += made
        if len(made) > 1:
            texts[f"{stem}.safetensors.index.json"] = index(made)
    return Snapshot(
        saved.folder(run_dir) / f"step-{step:06d}",
        step,
        mesh.rank,
        mesh.size,
        files,
        weights | moments,
        texts,
        keep,
        up_to,
    )


def write(snapshot: Snapshot, collect: Collect) -> Path:
    """The folder of a checkpoint, whole or not at all; `collect` is the ranks' way to wait for one
    another. Raises `CheckpointError` on every rank."""
    leads, final = snapshot.rank == 0, snapshot.final
    made, hashes = saved.temporary(final), {}

    def start() -> None:
        if leads:
            saved.start(final)
            for file in snapshot.files:
                file.create(made)
            for name, text in snapshot.texts.items():
                saved.write_json(made / name, text)

    def fill() -> None:
        for file in snapshot.files:
            file.write(made, snapshot.pieces)

    def hash_mine() -> dict[str, Any]:
        names = [*(file.name for file in snapshot.files), *snapshot.texts]
        mine = names[snapshot.rank :: snapshot.size]
        return {name: saved.fingerprint(made / name) for name in mine}

    def finish() -> None:
        if leads:
            saved.write_json(made / "manifest.json", {"files": hashes})
            saved.commit(final)

    for act in (start, fill, hash_mine, finish):
        done, problem = None, ""
        try:
            done = act()
        except OSError as error:
            problem = f"rank {snapshot.rank}: {error}" if snapshot.size > 1 else str(error)
        answers = collect((problem, done))
        problem = next((text for text, _ in answers if text), "")
        if problem:
            if leads:
                shutil.rmtree(made, ignore_errors=True)
            raise CheckpointError(f"checkpoint at step {snapshot.step} was not written: {problem}")
        for _, found in answers:
            hashes |= found or {}
    if leads:
        saved.remove_old(final.parent, snapshot.keep, snapshot.up_to)
    return final


def _parameter_of(moment: str) -> str:
    """`layers.0.norm1.weight.exp_avg` → `layers.0.norm1.weight`."""
    return moment.rpartition(".")[0]


def read_config(path: Path) -> ModelConfig:
    """The architecture of a checkpoint."""
    values = json.loads((path / "config.json").read_text())
    values.pop("model_type")
    return from_dict(ModelConfig, values)


def load_model(path: Path, model: nn.Module, sharding: Sharding = SINGLE_PROCESS.sharding) -> None:
    """Copies the weights and buffers of a checkpoint into `model`, whose names and shapes must be
    the same; of each tensor the slice that lies here, whatever mesh wrote it."""
    targets = _model_tensors(model)
    with TensorReader(path, "model") as reader:
        if set(reader.names()) != set(targets):
            differing = sorted(set(reader.names()) ^ set(targets))[0]
            raise CheckpointError(
                f"{path.name}: {differing} is only in the model or only in the file"
            )
        with torch.no_grad():
            for name, target in targets.items():
                shape, wanted = reader.shape(name), local_shard(name, target, sharding).shape
                if shape != wanted:
                    raise CheckpointError(
                        f"{path.name}: {name} is {shape} in the file and {wanted} in the model"
                    )
                target.copy_(reader.read(name, local_slices(name, shape, sharding)))


def load(
    path: Path,
    model: nn.Module,
    optimizers: Optimizers,
    config: ModelConfig,
    sharding: Sharding = SINGLE_PROCESS.sharding,
) -> dict[str, Any]:
    """Restores model, optimisers and random number generators; returns the rest of the state.

    Raises `UsageError` naming the first field in which the architecture differs from `config`.
    """
    check_architecture(read_config(path), config)
    load_model(path, model, sharding)
    state = json.loads((path / "state.json").read_text())
    with TensorReader(path, "optimizer") as reader:
        moments = {
            name: reader.read(name, local_slices(_parameter_of(name), reader.shape(name), sharding))
            for name in reader.names()
        }
    optimizers.load_tensors(moments, state["updates"])
    if len(state["rng"]) == sharding.mesh.size:  # on another mesh the random numbers are others
        _set_rng_state(state["rng"][sharding.mesh.rank])
    return state


def check_architecture(before: ModelConfig, wanted: ModelConfig) -> None:
    """Raises `UsageError` on the first differing field; strengths of balance losses may change
    within a run."""
    ours = leaves(dataclasses.asdict(wanted), "model.")
    free = tuple(f"model.moe.balance.{name}" for name in ("aux", "aux_scope", "z", "bias_rate"))
    for name, old in leaves(dataclasses.asdict(before), "model.").items():
        if ours[name] != old and name not in free:
            raise UsageError(
                f"resume: {name} is {old} in the checkpoint and {ours[name]} in the recipe; "
                "resume with the run's own recipe and options, or start another run"
            )


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Views of what lies here of parameters and persistent buffers; a tensor shared by two names
    (tied head) appears once."""
    tensors, seen = {}, set()
    for name, value in model.state_dict().items():
        value = to_local(value)
        if value.numel() and value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        tensors[name] = value
    return tensors


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    encode = [
        base64.b64encode(t.numpy().tobytes()).decode() for t in [torch.get_rng_state(), *cuda]
    ]
    return {"torch": encode[0], "cuda": encode[1:]}


def _set_rng_state(kept: dict[str, Any]) -> None:
    def decode(text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(decode(kept["torch"]))
    if kept["cuda"] and len(kept["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([decode(text) for text in kept["cuda"]])
