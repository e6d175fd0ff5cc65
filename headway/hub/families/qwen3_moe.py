"""Qwen3-MoE (arXiv 2505.09388): QK-norm per head, some layers may be dense."""

from headway.hub.decoder import SILU, decoder_keys, placement
from headway.hub.families.olmoe import OLMOE
from headway.hub.family import Family, Key, Keys, Values, lookup


def _read_window(values: Values) -> Values:
    width = lookup(values, "sliding_window", 4096)
    return {"window": [width] if lookup(values, "use_sliding_window", False) else []}


def _write_window(ours: Values) -> Values:
    width = ours["window"][0] if ours["window"] else None
    return {"use_sliding_window": width is not None, "sliding_window": width}


WINDOW = Keys("use_sliding_window sliding_window max_window_layers", _read_window, _write_window)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *decoder_keys(max_len=32_768),
        Key("head_dim", "d_head", 0),
        Key("intermediate_size", "d_ff", 6144),
        Key("moe_intermediate_size", "moe.d_expert", 768),
        Key("hidden_act", "activation", "silu", values=SILU),
        Key("hidden_act", "moe.activation", "silu", values=SILU),
        Key("num_experts num_local_experts", "moe.n_experts", 128),
        Key("num_experts_per_tok", "moe.top_k", 8),
        Key("norm_topk_prob", "moe.router.renormalize", False),
        Key("attention_bias", "qkv_bias", False),
        Key("attention_bias", "o_bias", False),
        placement(),
        WINDOW,
    ),
    rows=OLMOE.rows,
    fixed={"qk_norm": "head", "moe.kind": "moe", "moe.router.gate": "softmax_topk"},
)
