"""Load checkpoints: every rank reads its slices, whatever mesh wrote them."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headway.checkpoint.state import model_tensors, parameter_of, set_rng_state
from headway.checkpoint.tensor_reader import TensorReader
from headway.config import ModelConfig, UsageError, from_dict, leaves
from headway.optim.groups import Optimizers
from headway.parallel.local_shards import local_shard, local_slices
from headway.parallel.parallelize import SINGLE_PROCESS
from headway.parallel.placement import Sharding


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: Optimizers,
    config: ModelConfig,
    sharding: Sharding = SINGLE_PROCESS.sharding,
) -> dict[str, Any]:
    """Restore model, optimisers and random number generators; return the rest of the state. Raises
    `UsageError` naming the first field in which the architecture differs from `config`."""
    check_architecture(read_model_config(path), config)
    load_weights(path, model, sharding)
    state = json.loads((path / "state.json").read_text())
    with TensorReader(path, "optimizer") as reader:
        tensors = {
            name: reader.read(name, local_slices(parameter_of(name), reader.shape(name), sharding))
            for name in reader.names()
        }
    optimizers.load_tensors(tensors, state["updates"])
    if len(state["rng"]) == sharding.mesh.size:  # another mesh draws other random numbers
        set_rng_state(state["rng"][sharding.mesh.rank])
    return state


class Weights(Protocol):
    """Tensors on disk, under the names of our parameters and buffers."""

    folder: Path

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(
        self, name: str, slices: tuple[slice, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a tensor of the caller's own, or the part that `slices` select, in `dtype`."""
        ...


def load_weights(
    path: Path, model: nn.Module, sharding: Sharding = SINGLE_PROCESS.sharding
) -> None:
    """Copy the weights and buffers of a checkpoint into `model`, of each tensor the slice that this
    rank holds. Raises UsageError where names or shapes differ."""
    targets = model_tensors(model)
    with TensorReader(path, "model") as reader, torch.no_grad():
        shapes = {name: local_shard(name, x, sharding).shape for name, x in targets.items()}
        _check_tensors(reader, shapes)
        for name, target in targets.items():
            target.copy_(reader.read(name, local_slices(name, shapes[name], sharding)))


def read_weights(
    reader: Weights,
    model: nn.Module,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    sharding: Sharding = SINGLE_PROCESS.sharding,
) -> None:
    """Give a model on the meta device its weights and buffers on `device`, each in its dtype, of
    each the slice that this rank holds: one tensor after the other goes from disk to where it
    stays. Raises UsageError where names or shapes differ."""
    # a module in several places (looped depth) is stored once, under its first name
    first: dict[int, tuple[str, Tensor]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        first.setdefault(id(x), (name, x))
    targets = dict(first.values())
    shapes = {name: local_shard(name, x, sharding).shape for name, x in targets.items()}
    _check_tensors(reader, shapes)
    for name in targets:
        part = local_slices(name, shapes[name], sharding)
        assign(model, name, reader.read(name, part, dtypes[name]).to(device))


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).load_state_dict({leaf: value}, strict=False, assign=True)


def _check_tensors(reader: Weights, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UsageError naming the first tensor that differs in name or shape."""
    if set(reader.names()) != set(shapes):
        differing = sorted(set(reader.names()) ^ set(shapes))[0]
        where = "only in the model or only in the file; modules of your own need blocks="
        raise UsageError(f"{reader.folder.name}: {differing} is {where}")
    for name, wanted in shapes.items():
        if (shape := reader.shape(name)) != wanted:
            differs = f"{name} is {shape} in the file and {wanted} in the model"
            raise UsageError(f"{reader.folder.name}: {differs}")


def read_model_config(path: Path) -> ModelConfig:
    """Return the architecture of a checkpoint."""
    values = json.loads((path / "config.json").read_text())
    values.pop("model_type")
    return from_dict(ModelConfig, values)


def check_architecture(before: ModelConfig, wanted: ModelConfig) -> None:
    """Raise `UsageError` on the first differing field; strengths of balance losses may change."""
    ours = leaves(dataclasses.asdict(wanted), "model.")
    free = tuple(f"model.moe.balance.{name}" for name in ("aux", "aux_scope", "z", "bias_rate"))
    for name, old in leaves(dataclasses.asdict(before), "model.").items():
        if ours[name] != old and name not in free:
            raise UsageError(
                f"resume: {name} is {old} in the checkpoint and {ours[name]} in the recipe; "
                "resume with the run's own recipe and options, or start another run"
            )
