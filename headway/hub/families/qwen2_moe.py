"""Qwen2-MoE (arXiv 2407.10671): biases on queries, keys and values, a gated shared expert."""

from collections.abc import Iterator

from headway.config import ModelConfig
from headway.hub.decoder import (
    SILU,
    decoder_keys,
    decoder_rows,
    layer_windows,
    placement,
    sparse_rows,
)
from headway.hub.family import Family, Key, Values, lookup
from headway.hub.layout import Row, dense_rows


def _rows(config: ModelConfig, fused: bool) -> Iterator[Row]:
    def feed_forward(theirs: str, layer: int) -> Iterator[Row]:
        yield from sparse_rows(config, theirs, layer, fused)
        if config.is_sparse(layer):
            ours = f"layers.{layer}.ffn"
            yield from dense_rows(f"{theirs}.mlp.shared_expert", f"{ours}.shared")
            yield Row(f"{theirs}.mlp.shared_expert_gate.weight", f"{ours}.shared_gate.weight")

    return decoder_rows(config, feed_forward)


def _is_windowed(values: Values, layer: int) -> bool:
    """Every other layer, below `max_window_layers`."""
    return layer % 2 == 0 and layer < lookup(values, "max_window_layers", 28)


QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys=(
        *decoder_keys(max_len=32_768),
        Key("head_dim", "d_head", 0),
        Key("intermediate_size", "d_ff", 5632),
        Key("moe_intermediate_size", "moe.d_expert", 1408),
        Key("shared_expert_intermediate_size", "moe.d_shared", 5632),
        Key("hidden_act", "activation", "silu", values=SILU),
        Key("hidden_act", "moe.activation", "silu", values=SILU),
        Key("num_experts num_local_experts", "moe.n_experts", 60),
        Key("num_experts_per_tok", "moe.top_k", 4),
        Key("norm_topk_prob", "moe.router.renormalize", False),
        Key("qkv_bias", "qkv_bias", True),
        placement(),
        layer_windows(_is_windowed),
    ),
    rows=_rows,
    fixed={
        "qk_norm": "none",
        "moe.kind": "moe",
        "moe.router.gate": "softmax_topk",
        "moe.shared_gate": True,
    },
)
