"""Parameters and FLOPs of a model (research: arXiv 2602.04870 §3, 2601.18089 eq. 1–2).

Sizes under the letters of `plan.shape`. A FLOP is one multiplication or one addition, so a matmul
of `[m, k]` and `[k, n]` is 2·m·k·n; norms, activations and look-ups are left out. The backward pass
of a matmul is two matmuls of the same size, hence training is three times the forward pass.
"""

from headway.config import ModelConfig
from headway.plan.shape import Item, Shape, shape_of, total


def parameters(model: ModelConfig) -> tuple[Item, ...]:
    """Every parameter, in groups."""
    s = shape_of(model)
    return (*_around_experts(model, s), _experts(s, s.E, "E"))


def active_parameters(model: ModelConfig) -> tuple[Item, ...]:
    """Those that one token visits: K of the E experts of each head, and everything else.

    The embedding counts whole, as is usual, although a token reads one row of it.
    """
    s = shape_of(model)
    return (*_around_experts(model, s), _experts(s, s.K, "K"))


def _experts(s: Shape, n: int, letter: str) -> Item:
    value = s.n_sparse * n * (s.G + 1) * s.F * s.D_L
    return Item("experts", value, f"layers·{letter}·(G+1)·F·D_L")


def _around_experts(model: ModelConfig, s: Shape) -> tuple[Item, ...]:
    attention = s.D * s.d * (2 * s.N + 2 * s.M)
    formula = "layers·D·d·(2N + 2M)"
    if model.attn_gate:
        attention += s.D * s.N
        formula = "layers·(D·d·(2N + 2M) + D·N)"
    norms = 2 * s.D * s.n_layers + s.D
    if model.qk_norm:
        norms += 2 * s.d * s.n_layers
    if s.projected and model.moe.latent_norm:
        norms += s.n_sparse * s.D_L
    heads = 1 if model.tied else 2
    noisy = 2 if model.moe.router.noisy else 1
    items = (
        Item("embedding and output head", heads * s.V * s.D, f"{heads}·V·D"),
        Item("attention", s.n_layers * attention, formula),
        Item("norms", norms, "2·D per layer, D at the end, 2·d with QK-norm, D_L with latent norm"),
        Item("dense networks", s.n_dense * (s.G_dense + 1) * s.D * s.F_dense, "layers·(G+1)·D·F"),
        Item("routers", s.n_sparse * s.H * s.E * s.D_R * noisy, "layers·H·E·D_R (twice if noisy)"),
        Item("latent projections", s.n_sparse * 2 * s.D * s.D_L * s.projected, "layers·2·D·D_L"),
        Item(
            "shared experts",
            s.n_sparse * (s.G + 1) * s.D * s.F_shared,
            "layers·(G+1)·D·F_shared",
        ),
    )
    return tuple(item for item in items if item.value)


def flops(model: ModelConfig, seq_len: int) -> tuple[Item, ...]:
    """FLOPs of the forward pass per token, in groups; training is three times as much.

    Attention scores count what causality and windows leave: a position sees (S+1)/2 keys on average
    with full attention.
    """
    s = shape_of(model)
    projections = s.D * s.d * (2 * s.N + 2 * s.M) + (s.D * s.N if model.attn_gate else 0)
    keys = sum(mean_keys(seq_len, window) for window in s.windows)
    noisy = 2 if model.moe.router.noisy else 1
    items = (
        Item("attention projections", 2 * s.n_layers * projections, "layers·2·D·d·(2N + 2M)"),
        Item("attention scores", 4 * s.N * s.d * keys, "Σ over layers 4·N·d·mean keys seen"),
        Item("dense networks", 2 * s.n_dense * (s.G_dense + 1) * s.D * s.F_dense, "2·(G+1)·D·F"),
        Item("routers", 2 * s.n_sparse * s.H * s.E * s.D_R * noisy, "layers·2·H·E·D_R"),
        Item("latent projections", 4 * s.n_sparse * s.D * s.D_L * s.projected, "layers·4·D·D_L"),
        Item("experts", 2 * s.n_sparse * s.K * (s.G + 1) * s.F * s.D_L, "layers·2·K·(G+1)·F·D_L"),
        Item(
            "shared experts",
            2 * s.n_sparse * (s.G + 1) * s.D * s.F_shared,
            "layers·2·(G+1)·D·F_shared",
        ),
        Item("output head", 2 * s.V * s.D, "2·V·D"),
    )
    return tuple(item for item in items if item.value)


def training_flops(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token: 3 × forward. What `recompute` does twice is not
    counted as work."""
    return 3 * total(flops(model, seq_len))


def mean_keys(seq_len: int, window: int) -> float:
    """How many keys a position sees on average over a sequence, itself included."""
    w = min(window or seq_len, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
