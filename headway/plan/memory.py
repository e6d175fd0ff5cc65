"""Bytes that training holds: weights, gradients, optimiser state, and what the forward pass keeps
for backward.

b is the size of a value in the dtype of the matmuls. Activations are those of the default CPU path,
counted tensor by tensor; short-lived buffers (one expert's rows, one chunk of logits) come on top
and do not grow with depth.
"""

from headway.config import Config, ModelConfig, OptimConfig
from headway.plan.cost import parameters
from headway.plan.shape import Item, Shape, shape_of, total

_BY_ADAMW = ("embedding and output head", "norms", "routers")  # the rest are Muon's, if it is on


def states(config: Config) -> tuple[Item, ...]:
    """Weights, gradients and optimiser state on one process, independent of the batch."""
    return states_of(parameters(config.model), config.optim)


def states_of(held: tuple[Item, ...], optim: OptimConfig) -> tuple[Item, ...]:
    """The same for the parameters that one rank holds, in the groups of `cost.parameters`."""
    groups = {item.name: item.value for item in held}
    n = sum(groups.values())
    adamw = n - sum(value for name, value in groups.items() if by_muon(name, optim))
    moment = 2 if optim.state_dtype == "bfloat16" else 4
    items = (
        Item("weights", 4 * n, "4 bytes per parameter"),
        Item("gradients", 4 * n, "4 bytes per parameter"),
        Item("AdamW moments", 2 * moment * adamw, f"2·{moment} bytes per parameter"),
        Item("Muon momentum", 4 * (n - adamw), "4 bytes per parameter of the blocks' matrices"),
    )
    return tuple(item for item in items if item.value)


def by_muon(group: str, optim: OptimConfig) -> bool:
    """Whether Muon updates a group of `cost.parameters`; AdamW does otherwise."""
    if optim.name != "muon" or group in _BY_ADAMW:
        return False
    return optim.muon_experts or group != "experts"


def activations(
    model: ModelConfig,
    batch: int,
    seq_len: int,
    *,
    bytes_per_value: int = 4,
    recompute: bool = False,
    doc_mask: bool = False,
) -> tuple[Item, ...]:
    """Bytes that one forward pass over `batch` sequences keeps for backward, in groups over all
    layers."""
    s, T, b = shape_of(model), batch * seq_len, bytes_per_value
    items = (
        Item(
            "residual stream and norms",
            T * (2 * s.n_layers + 1) * (2 * s.D * b + 4) - T * s.D * b + 8 * T,
            "T·(2·layers + 1)·(2·D·b + 4)",
        ),
        Item("attention", s.n_layers * _attention(model, s, T, seq_len, b), _ATTENTION),
        Item("masks", _masks(s, batch, seq_len, b, doc_mask), "S·S·b, per sequence with doc_mask"),
        Item(
            "dense networks",
            s.n_dense * T * b * _dense(model.activation, s.F_dense),
            "T·b·F·(3 with SwiGLU, else 2)",
        ),
        Item("routers", s.n_sparse * _router(model, s, T, b, recompute), _ROUTER),
        Item(
            "sub-tokens and expert outputs",
            s.n_sparse * _latent(model, s, T, b),
            "2·T·D_L·b of a latent layer",
        ),
        Item(
            "sorted rows",
            s.n_sparse * 16 * T * s.H * s.K,
            "16·R, two int64 tables of R = T·H·K rows",
        ),
        Item(
            "experts",
            0 if recompute else s.n_sparse * T * s.H * s.K * s.G * s.F * b,
            "R·G·F·b, nothing with recompute",
        ),
        Item(
            "shared experts",
            s.n_sparse * T * b * _dense(model.moe.activation, s.F_shared),
            "T·b·F_shared·(3 with SwiGLU, else 2)",
        ),
        Item(
            "gradients of the loss",
            T * s.D * b + 4 * s.V * s.D,
            "T·D·b + 4·V·D, kept in place of logits",
        ),
        Item(
            "weights cast to the matmul's dtype",
            0 if b == 4 else b * _cast(model),
            "b per parameter of projections and dense networks, nothing in float32",
        ),
    )
    return tuple(item for item in items if item.value)


_ATTENTION = "layers·T·b·d·(3N + 3M), of it N + M for QK-norm"
_ROUTER = "layers·(4·T·H·E + 12·R), with recompute 4·R"


def _attention(model: ModelConfig, s: Shape, T: int, seq_len: int, b: int) -> int:
    """Queries, keys, values, output, log-sum-exp; inputs and scales of QK-norm; the rotary
    tables."""
    kept = T * b * s.d * (2 * s.N + 2 * s.M) + 4 * T * s.N + 4 * seq_len * s.d
    if model.qk_norm:
        kept += T * (s.N + s.M) * (s.d * b + 4)
    if model.attn_gate:
        kept += T * s.N * b + T * s.N * s.d * b
    return kept


def _masks(s: Shape, batch: int, seq_len: int, b: int, doc_mask: bool) -> int:
    if doc_mask:
        return s.n_layers * batch * seq_len * seq_len * b
    return sum(0 < window < seq_len for window in s.windows) * seq_len * seq_len * b


def _dense(activation: str, width: int) -> int:
    """Values per token: what the activation reads and what it gives."""
    return (3 if activation == "swiglu" else 2) * width


def _router(model: ModelConfig, s: Shape, T: int, b: int, recompute: bool) -> int:
    rows = T * s.H * s.K
    if recompute:
        return 4 * rows
    scores = 4 * T * s.H * s.E + 12 * rows
    if model.moe.router.noisy:
        scores += 8 * T * s.H * s.E
    if b != 4:  # the float32 copy of what it reads
        reads_token = model.moe.reads_token or not s.projected
        scores += 4 * T * (s.D if reads_token else s.D_L)
    return scores


def _latent(model: ModelConfig, s: Shape, T: int, b: int) -> int:
    if not s.projected:
        return 0  # experts read the output of the norm, which is counted
    return 2 * T * s.D_L * b + (T * (s.D_L * b + 4 * s.H) if model.moe.latent_norm else 0)


def _cast(model: ModelConfig) -> float:
    names = ("attention", "dense networks", "latent projections", "shared experts")
    return total(tuple(item for item in parameters(model) if item.name in names))
