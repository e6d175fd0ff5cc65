"""Mixtral (arXiv 2401.04088): no QK-norm, softmax over the chosen scores."""

from collections.abc import Iterator

from headway.config import ModelConfig
from headway.hub.decoder import SILU, decoder_keys, decoder_rows, sparse_rows
from headway.hub.family import Family, Key, Keys, Values, lookup
from headway.hub.layout import Row, expert_rows


def _rows(config: ModelConfig, fused: bool) -> Iterator[Row]:
    def feed_forward(theirs: str, layer: int) -> Iterator[Row]:
        if fused:
            yield from sparse_rows(config, theirs, layer, fused)
            return
        theirs, ours = f"{theirs}.block_sparse_moe", f"layers.{layer}.ffn"
        yield Row(f"{theirs}.gate.weight", f"{ours}.router.w_HEL", "E D = 0 E D")
        names, n_experts = ("w1", "w3", "w2"), config.moe.n_experts
        yield from expert_rows(f"{theirs}.experts", f"{ours}.experts", n_experts, names)

    return decoder_rows(config, feed_forward)


def _read_window(values: Values) -> Values:
    width = lookup(values, "sliding_window", 0)
    return {"window": [width] if width else []}


def _write_window(ours: Values) -> Values:
    return {"sliding_window": ours["window"][0] if ours["window"] else None}


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    keys=(
        *decoder_keys(eps=1e-5, theta=1e6, max_len=131_072),
        Key("head_dim", "d_head", 0),
        Key("intermediate_size", "moe.d_expert"),
        Key("hidden_act", "moe.activation", "silu", values=SILU),
        Key("num_local_experts num_experts", "moe.n_experts", 8),
        Key("num_experts_per_tok", "moe.top_k", 2),
        Keys("sliding_window", _read_window, _write_window),
    ),
    rows=_rows,
    fixed={
        "qk_norm": "none",
        "moe.kind": "moe",
        "moe.router.gate": "softmax_topk",
        "moe.router.renormalize": True,
    },
)
