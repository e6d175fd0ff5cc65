"""The sizes of a model with every default filled in, under the letters that the formulas use."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from headway.config import ModelConfig


class Item(NamedTuple):
    """One line of a sum: what it is for, its value, and the formula that gave it."""

    part: Enum
    """The value of this member is the label."""
    value: float
    formula: str

    @property
    def name(self) -> str:
        """The label."""
        return self.part.value


Items = tuple[Item, ...]


def total(items: Iterable[Item]) -> float:
    """Return the sum of the values."""
    return sum(item.value for item in items)


@dataclass(frozen=True)
class Shape:
    """Sizes under the letters of AGENTS.md's legend."""

    D: int
    H: int
    E: int
    K: int
    L: int
    D_L: int
    """Width that the experts of all heads read: H·L, or D for a flat mixture."""
    G: int
    n_sparse: int
    """Sparse layers."""
    n_layers: int


def shape_of(model: ModelConfig) -> Shape:
    """Return the sizes of a valid config."""
    moe = model.moe
    return Shape(
        D=model.d_model,
        H=moe.n_heads,
        E=moe.n_experts,
        K=moe.top_k,
        L=moe.head_width(model.d_model),
        D_L=moe.latent_width(model.d_model),
        G=moe.n_inputs,
        n_sparse=sum(model.is_sparse(layer) for layer in range(model.n_layers)),
        n_layers=model.n_layers,
    )
