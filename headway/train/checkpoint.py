"""Checkpoints: ordinary Hugging Face safetensors in one folder that is complete or is not there.

    RUN/checkpoints/step-000060/
      model.safetensors      parameters and buffers under their state_dict names
      config.json            the architecture (ModelConfig)
      optimizer.safetensors  `<parameter>.exp_avg` and so on, never indices
      state.json             step, seeds, running statistics, random number generators
      manifest.json          size and SHA-256 of each file above

A folder is written under a temporary name beside its final one, every file and the folder are
synced, and then it
is renamed: a crash at any moment leaves the previous checkpoint untouched. SHA-256 and not a CRC:
it costs under a second per GiB, finds any damage, and lets people compare checkpoints by one line.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headway.config import ModelConfig, UsageError, from_dict
from headway.parallel.exchange import ALONE, Spread
from headway.parallel.gathered import whole
from headway.parallel.shard import Layout, local
from headway.train.optim import Optimizers

FILES = ("model.safetensors", "config.json", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"step-(\d+)(\.replaced)?")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the text is one line."""


def folder(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_dir / "checkpoints"


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    config: ModelConfig,
    state: dict[str, Any],
    keep: int = 2,
    spread: Spread = ALONE,
) -> Path:
    """Writes `checkpoints/step-{step:06d}`, then removes all but the newest `keep`; returns its
    path.

    `state` is JSON-ready; the random number generators are added to it. Raises `CheckpointError`
    when the disk is full or cannot be written; then nothing of this checkpoint is left and the
    earlier ones are untouched.
    """
    mesh = spread.mesh
    parent = folder(run_dir)
    final = parent / f"step-{step:06d}"
    # every rank brings its slices, the first one writes
    weights = whole(_model_tensors(model), spread)
    moments = whole(optimizers.tensors(), spread, owner=_parameter_of)
    random = mesh.collect(_rng_state())
    problem = ""
    if mesh.leads:
        counts = {"step": step, "updates": optimizers.adamw.updates}
        try:
            _write(final, weights, moments, config, {**state, **counts, "rng": random})
        except CheckpointError as error:
            problem = str(error)
    problem = mesh.collect(problem)[0]
    if problem:
        raise CheckpointError(problem)
    if mesh.leads:
        _remove_old(parent, keep)
    return final


def _parameter_of(moment: str) -> str:
    """`layers.0.norm1.weight.exp_avg` → `layers.0.norm1.weight`."""
    return moment.rpartition(".")[0]


def _write(
    final: Path,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    config: ModelConfig,
    state: dict[str, Any],
) -> None:
    """The folder of a checkpoint, whole or not at all."""
    parent = final.parent
    temporary = parent / f".tmp-{final.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(".tmp-*"):  # of a process that was killed while it wrote
            shutil.rmtree(stale)
        temporary.mkdir()
        save_file(weights, temporary / FILES[0], metadata={"format": "pt"})
        _write_json(temporary / FILES[1], {"model_type": "headway", **dataclasses.asdict(config)})
        tensors = {name: t.contiguous() for name, t in moments.items()}
        save_file(tensors, temporary / FILES[2], metadata={"format": "pt"})
        _write_json(temporary / FILES[3], state)
        manifest = {name: _fingerprint(temporary / name) for name in FILES}
        _write_json(temporary / "manifest.json", {"files": manifest})
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if (
            final.exists()
        ):  # written again after a resume: the old one is there until the new one is
            replaced = parent / f"{final.name}.replaced"
            shutil.rmtree(replaced, ignore_errors=True)  # of a process killed after its renames
            os.replace(final, replaced)
        os.replace(temporary, final)
        _sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        step = state["step"]
        raise CheckpointError(f"checkpoint at step {step} was not written: {error}") from error


def latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes `verify`, and one line for each newer one that does not."""
    problems = []
    for _, path in reversed(_listed(folder(run_dir))):
        problem = verify(path)
        if not problem:
            return path, problems
        problems.append(f"{path.name} is damaged ({problem})")
    return None, problems


def verify(path: Path) -> str:
    """What is wrong with a checkpoint folder, in a few words; empty when every file has its size
    and SHA-256."""
    try:
        wanted = json.loads((path / "manifest.json").read_text())["files"]
        for name in FILES:
            size = (path / name).stat().st_size
            if size != wanted[name]["size"]:
                return f"{name} has {size} bytes instead of {wanted[name]['size']}"
            if _fingerprint(path / name) != wanted[name]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read: {error}"
    return ""


def set_aside_after(run_dir: Path, step: int) -> list[str]:
    """Renames checkpoints later than `step` to `*.damaged`, so that they cannot count as the newest
    again."""
    moved = []
    for number, path in _listed(folder(run_dir)):
        if number > step:
            target = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)
            moved.append(target.name)
    return moved


def read_config(path: Path) -> ModelConfig:
    """The architecture of a checkpoint."""
    values = json.loads((path / "config.json").read_text())
    values.pop("model_type")
    return from_dict(ModelConfig, values)


def load_model(path: Path, model: nn.Module, layout: Layout = ALONE.layout) -> None:
    """Copies the weights and buffers of a checkpoint into `model`, whose names and shapes must be
    the same; of each tensor the slice that lies here, whatever mesh wrote it."""
    targets = _model_tensors(model)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        if names != set(targets):
            differing = sorted(names ^ set(targets))[0]
            raise CheckpointError(
                f"{path.name}: {differing} is only in the model or only in the file"
            )
        with torch.no_grad():
            for name, target in targets.items():
                value = layout.slice(name, file.get_tensor(name))
                if value.shape != target.shape:
                    raise CheckpointError(
                        f"{path.name}: {name} is {tuple(value.shape)} in the file and "
                        f"{tuple(target.shape)} in the model"
                    )
                target.copy_(value)


def load(
    path: Path,
    model: nn.Module,
    optimizers: Optimizers,
    config: ModelConfig,
    layout: Layout = ALONE.layout,
) -> dict[str, Any]:
    """Restores model, optimisers and random number generators; returns the rest of the state.

    Raises `UsageError` naming the first field in which the architecture differs from `config`.
    """
    check_architecture(read_config(path), config)
    load_model(path, model, layout)
    state = json.loads((path / "state.json").read_text())
    moments = load_file(path / "optimizer.safetensors")
    here = {name: layout.slice(_parameter_of(name), x) for name, x in moments.items()}
    optimizers.load_tensors(here, state["updates"])
    if len(state["rng"]) == layout.mesh.size:  # on another mesh the random numbers are others
        _set_rng_state(state["rng"][layout.mesh.rank])
    return state


def check_architecture(saved: ModelConfig, wanted: ModelConfig) -> None:
    """Raises `UsageError` on the first differing field; strengths of balance losses may change
    within a run."""
    ours = _flat(dataclasses.asdict(wanted), "model")
    free = tuple(f"model.moe.balance.{name}" for name in ("aux", "aux_scope", "z", "bias_rate"))
    for name, old in _flat(dataclasses.asdict(saved), "model").items():
        if ours[name] != old and name not in free:
            raise UsageError(
                f"resume: {name} is {old} in the checkpoint and {ours[name]} in the recipe; "
                "resume with the run's own recipe and options, or start another run"
            )


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    leaves = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}"
        leaves.update(_flat(value, name) if isinstance(value, dict) else {name: value})
    return leaves


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Views of what lies here of parameters and persistent buffers; a tensor shared by two names
    (tied head) appears once."""
    tensors, seen = {}, set()
    for name, value in model.state_dict().items():
        value = local(value)
        if value.numel() and value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        tensors[name] = value if value.is_contiguous() else value.contiguous()
    return tensors


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    encode = [
        base64.b64encode(t.numpy().tobytes()).decode() for t in [torch.get_rng_state(), *cuda]
    ]
    return {"torch": encode[0], "cuda": encode[1:]}


def _set_rng_state(saved: dict[str, Any]) -> None:
    def decode(text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(decode(saved["torch"]))
    if saved["cuda"] and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([decode(text) for text in saved["cuda"]])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _listed(parent: Path) -> list[tuple[int, Path]]:
    """(step, folder), oldest first; a replaced folder sorts before the one that replaces it."""
    found = []
    if parent.is_dir():
        for path in parent.iterdir():
            if (match := _NAME.fullmatch(path.name)) and path.is_dir():
                found.append((int(match[1]), not match[2], path))
    return [(step, path) for step, _, path in sorted(found)]


def _remove_old(parent: Path, keep: int) -> None:
    """Best effort: a checkpoint that cannot be removed now is removed after a later save."""
    listed = _listed(parent)
    newest = [path for _, path in listed if not path.name.endswith(".replaced")][-keep:]
    for _, path in listed:
        if path not in newest:
            with contextlib.suppress(OSError):
                doomed = path.with_name(
                    f".tmp-{path.name}"
                )  # half removed is never half a checkpoint
                os.replace(path, doomed)
                shutil.rmtree(doomed)
