"""The tree of all options, to and from plain dictionaries."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from headway.config.data import DataConfig
from headway.config.errors import UsageError
from headway.config.mesh import MeshConfig
from headway.config.model import ModelConfig
from headway.config.optim import OptimConfig
from headway.config.run import RunConfig


@dataclass(frozen=True)
class Config:
    """Every option of a run. Recipes return one; `dataclasses.replace` or the command line change
    it."""

    recipe: str = ""
    """Name of the recipe that made this configuration."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Where it runs."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it learns."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it learns."""
    run: RunConfig = field(default_factory=RunConfig)
    """What is written where."""

    @property
    def run_dir(self) -> str:
        """Return the run folder: `run.dir`, or runs/RECIPE."""
        return self.run.dir or f"runs/{self.recipe or 'run'}"

    def to_dict(self) -> dict:
        """Return a plain, JSON-ready nested dict; `from_dict` inverts it."""
        return dataclasses.asdict(self)


FORMER = {("qk_norm", True): "head", ("qk_norm", False): "none"}
"""(field, value that former versions wrote) → its value today."""


def from_dict(cls: type, values: dict):
    """Rebuild a config dataclass from what `to_dict` returned, now or in a former version. A
    missing key takes its default; an unknown one raises UsageError."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UsageError(
            f"{cls.__name__} has no field {unknown[0]!r}; it was written by another version"
        )
    arguments = {}
    for name, value in values.items():
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            arguments[name] = from_dict(kind, value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            arguments[name] = tuple(value)
        else:
            arguments[name] = FORMER.get((name, value), value)
    return cls(**arguments)


def with_leaf(config: Any, path: str, value: Any) -> Any:
    """Return `config` with the leaf at `path`, as `model.moe.top_k`, replaced. Raises UsageError
    for a path that it has not."""
    name, _, rest = path.partition(".")
    if name not in {f.name for f in dataclasses.fields(config)}:
        raise UsageError(f"{type(config).__name__} has no field {name!r}")
    inner = with_leaf(vars(config)[name], rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: `{"model": {"d_model": 1}}` → `{"model.d_model": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
