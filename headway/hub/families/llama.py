"""Llama (arXiv 2302.13971), Llama 2 and 3, SmolLM2 and others: dense."""

from collections.abc import Iterator

from headway.config import ModelConfig
from headway.hub.decoder import SILU, constant, decoder_keys, decoder_rows
from headway.hub.family import Family, Key
from headway.hub.layout import Row, dense_rows


def _rows(config: ModelConfig, fused: bool) -> Iterator[Row]:
    def feed_forward(theirs: str, layer: int) -> Iterator[Row]:
        return dense_rows(f"{theirs}.mlp", f"layers.{layer}.ffn")

    return decoder_rows(config, feed_forward)


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    keys=(
        *decoder_keys(max_len=2048),
        Key("head_dim", "d_head", 0),
        Key("intermediate_size", "d_ff"),
        Key("hidden_act", "activation", "silu", values=SILU),
        Key("attention_bias", "qkv_bias", False),
        Key("attention_bias", "o_bias", False),
        constant("mlp_bias", False),
    ),
    rows=_rows,
    fixed={"qk_norm": "none", "moe.kind": "dense"},
)
