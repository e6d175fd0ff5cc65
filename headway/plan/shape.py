"""The sizes of a model with every default filled in, under the letters that the formulas use."""

from dataclasses import dataclass

from headway.config import ModelConfig, n_inputs


@dataclass(frozen=True)
class Item:
    """One line of a sum: a value and the formula that gave it."""

    name: str
    value: float
    formula: str


def total(items: tuple[Item, ...]) -> float:
    """Sum of the values."""
    return sum(item.value for item in items)


@dataclass(frozen=True)
class Shape:
    """Letters as in the legend of DESIGN: sizes of one layer, and how many layers of each kind
    there are."""

    V: int
    D: int
    N: int
    """Query heads of attention."""
    M: int
    """Key/value heads."""
    d: int
    """Width of an attention head."""
    F_dense: int
    G_dense: int
    """Pre-activations per hidden unit of the dense network: 2 with SwiGLU, else 1."""
    H: int
    E: int
    K: int
    F: int
    G: int
    D_L: int
    """Width that the experts of all heads read: H·L, or D for a flat mixture."""
    D_R: int
    """Width that the router of one head reads: L, or D."""
    F_shared: int
    n_sparse: int
    n_dense: int
    windows: tuple[int, ...]
    """One per layer; 0 is full attention."""
    projected: bool
    """Whether the sparse layers have W_in and W_out."""

    @property
    def L(self) -> int:
        """Width of one latent head."""
        return self.D_L // self.H

    @property
    def n_layers(self) -> int:
        """All blocks."""
        return self.n_sparse + self.n_dense


def shape_of(model: ModelConfig) -> Shape:
    """The sizes of a valid config whose `vocab_size` is resolved."""
    moe = model.moe
    n_sparse = sum(model.is_sparse(layer) for layer in range(model.n_layers))
    return Shape(
        V=model.vocab_size,
        D=model.d_model,
        N=model.n_heads,
        M=model.kv_heads,
        d=model.head_width,
        F_dense=model.d_ff,
        G_dense=n_inputs(model.activation),
        H=moe.n_heads,
        E=moe.n_experts,
        K=moe.top_k,
        F=moe.d_expert,
        G=moe.n_inputs,
        D_L=moe.latent_width(model.d_model),
        D_R=moe.router_width(model.d_model),
        F_shared=moe.d_shared,
        n_sparse=n_sparse,
        n_dense=model.n_layers - n_sparse,
        windows=tuple(model.window_of(layer) for layer in range(model.n_layers)),
        projected=moe.is_latent,
    )
