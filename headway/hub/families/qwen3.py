"""Qwen3 (arXiv 2505.09388), dense: Llama with QK-norm per head."""

from headway.hub.decoder import SILU, decoder_keys, layer_windows
from headway.hub.families.llama import LLAMA
from headway.hub.family import Family, Key, Values, lookup


def _is_windowed(values: Values, layer: int) -> bool:
    return layer >= lookup(values, "max_window_layers", 28)


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(
        *decoder_keys(max_len=32_768),
        Key("head_dim", "d_head", 128),
        Key("intermediate_size", "d_ff"),
        Key("hidden_act", "activation", "silu", values=SILU),
        Key("attention_bias", "qkv_bias", False),
        Key("attention_bias", "o_bias", False),
        layer_windows(_is_windowed),
    ),
    rows=LLAMA.rows,
    fixed={"qk_norm": "head", "moe.kind": "dense"},
)
