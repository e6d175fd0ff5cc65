"""Small models on synthetic worlds, and how often they are wrong.

Two layers of width 64 with four heads, batches of 64 items, Muon: what the command for recall in
docs/worlds.md has. Sparse layers have the executed FLOPs per token of the dense one (expert width
is solved)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway import recipes
from headway.config import Config, ModelConfig, with_leaf
from headway.data.worlds.source import WorldSource
from headway.data.worlds.spec import parse_world
from headway.eval.worlds import score
from headway.hub.load import LoadedModel, load_model
from headway.lab.experiment import Arm, Experiment
from headway.lab.rows import Row
from headway.lab.study import Series
from headway.model.build import Block, build_block
from headway.model.compute import Compute
from headway.train.budget import Budget

SMALL: dict[str, Any] = {
    "data.batch_size": 64,
    "model.n_layers": 2,
    "model.d_model": 64,
    "model.d_ff": 128,
    "model.qk_norm": "none",
    "model.rope_theta": 100.0,
    "optim.muon_lr": 0.01,
    "optim.warmup_steps": 50,
}
SPARSE: dict[str, dict[str, Any]] = {
    "dense": {},
    "flat": {"moe.n_experts": 8, "moe.top_k": 2},
    "2x32": {"moe.n_heads": 2, "moe.n_experts": 8, "moe.top_k": 2},
    "flat, E 32": {"moe.n_experts": 32, "moe.top_k": 2},
}
RECIPES = {"dense": "dense", "2x32": "multi_head_latent"}
SOLVED = 0.05
"""A run has solved a task that gets fewer of the targets of new items wrong."""
ITEMS = 512


def arm(name: str, world: str, design: str = "", **fields: Any) -> Arm:
    """Return a design (`SPARSE`; the name where it is not said) on a world, with further fields."""
    design = design or name
    config = recipes.load(RECIPES.get(design, "moe"))
    sizes = {f"model.{field}": value for field, value in SPARSE[design].items()}
    if design != "dense":
        sizes["model.moe.d_expert"] = 64
    further = {field.replace("__", "."): value for field, value in fields.items()}
    data = {"data.source": (f"world:{world}",), "data.seq_len": parse_world(world).n_tokens}
    return Arm(name, _changed(config, {**SMALL, **sizes, **data, **further}))


def series(corpus: str, arms: tuple[Arm, ...], seeds: tuple[int, ...], steps: int) -> Series:
    """Return runs on one world; the first arm is the baseline."""
    matched = ("active-flops",) if len({a.config.model.moe.kind for a in arms}) > 1 else ()
    experiment = Experiment(arms, seeds, Budget(steps=steps), match=matched, evaluations=1)
    return Series("confirm", corpus, experiment, (steps,))


def opened(folder: Path) -> tuple[LoadedModel, WorldSource]:
    """Return the model of a run, and its world."""
    loaded = load_model(folder, dtype="float32", threads=1)
    (spec,) = loaded.config.data.source
    return loaded, WorldSource.open(spec, loaded.tokenizer)


def at_length(source: WorldSource, length: int) -> WorldSource:
    """Return a world at another length."""
    world: Any = source.world
    return dataclasses.replace(source, world=dataclasses.replace(world, length=length))


def wrong(folder: Path) -> dict[str, float]:
    """Return the share of targets, and of whole items, that a run has wrong, and the least share
    that a shallow guess has wrong."""
    loaded, source = opened(folder)
    result = score(loaded.model, loaded.tokenizer.vocab_size, source, ITEMS)
    return {
        "targets wrong": 1 - result.accuracy,
        "items wrong": 1 - result.exact,
        "floor": 1 - max(result.floors),
    }


def solved(rows: Sequence[Row], corpus: str, name: str) -> int:
    """Return how many runs of an arm on a world have solved it. Raises KeyError where one diverged:
    it has no scores, and what it would have had cannot be told."""
    chosen = [row for row in rows if (row["corpus"], row["arm"]) == (corpus, name)]
    return sum(row["scores"]["targets wrong"] < SOLVED for row in chosen)


def mean_wrong(rows: Sequence[Row], corpus: str, name: str, what: str = "items wrong") -> float:
    """Return a score of an arm on a world, the mean over seeds. Raises KeyError where a run
    diverged."""
    chosen = [row for row in rows if (row["corpus"], row["arm"]) == (corpus, name)]
    return sum(row["scores"][what] for row in chosen) / len(chosen)


def _changed(config: Config, values: dict[str, Any]) -> Config:
    for name, value in values.items():
        config = with_leaf(config, name, value)
    return config


class LoopedBlocks:
    """Builds one block and returns it for each layer: how a looped model is read."""

    def __init__(self) -> None:
        self.block: Block | None = None

    def __call__(self, config: ModelConfig, layer: int, compute: Compute) -> Block:
        self.block = self.block or build_block(config, layer, compute)
        return self.block


def tensor_names(folder: Path) -> list[str]:
    """Return the names of the weights of a run's last checkpoint."""
    from safetensors import safe_open

    files = sorted(folder.glob("checkpoints/*/*.safetensors"))
    names: list[str] = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    return names
