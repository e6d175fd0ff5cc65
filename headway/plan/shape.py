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
    """Sizes of one layer under the letters of AGENTS.md's legend, and the number of layers of each
    kind."""

    V: int
    D: int
    N: int
    """Query heads of attention."""
    M: int
    """Key/value heads."""
    d: int
    """Width of an attention head."""
    F_dense: int
    H: int
    E: int
    K: int
    F: int
    G: int
    D_L: int
    """Width that the experts of all heads read: H·L, or D for a flat mixture."""
    F_shared: int
    n_sparse: int
    n_dense: int

    @property
    def L(self) -> int:
        """Width of one latent head."""
        return self.D_L // self.H

    @property
    def n_layers(self) -> int:
        """All blocks."""
        return self.n_sparse + self.n_dense


def shape_of(model: ModelConfig) -> Shape:
    """Return the sizes of a valid config whose `vocab_size` is resolved."""
    moe = model.moe
    n_sparse = sum(model.is_sparse(layer) for layer in range(model.n_layers))
    return Shape(
        V=model.vocab_size,
        D=model.d_model,
        N=model.n_heads,
        M=model.kv_heads,
        d=model.head_width,
        F_dense=model.d_ff,
        H=moe.n_heads,
        E=moe.n_experts,
        K=moe.top_k,
        F=moe.d_expert,
        G=moe.n_inputs,
        D_L=moe.latent_width(model.d_model),
        F_shared=moe.d_shared,
        n_sparse=n_sparse,
        n_dense=model.n_layers - n_sparse,
    )
