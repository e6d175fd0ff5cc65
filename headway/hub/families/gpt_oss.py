"""GPT-OSS (arXiv 2508.10925): sinks, biases everywhere, clamped SwiGLU, windows in every other
layer, experts in MXFP4."""

from collections.abc import Iterator

from headway.config import ModelConfig
from headway.hub.decoder import constant, decoder_keys, decoder_rows, layer_windows
from headway.hub.family import Family, Key, Values
from headway.hub.layout import Row, interleaved_expert_rows

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Rotary embedding where config.json says nothing of it."""


def _rows(config: ModelConfig, fused: bool) -> Iterator[Row]:
    """Fused is the only form."""

    def feed_forward(theirs: str, layer: int) -> Iterator[Row]:
        ours = f"layers.{layer}"
        yield Row(f"{theirs}.self_attn.sinks", f"{ours}.mixer.sinks_N")
        router = f"{ours}.ffn.router"
        yield Row(f"{theirs}.mlp.router.weight", f"{router}.w_HEL", "E D = 0 E D")
        yield Row(f"{theirs}.mlp.router.bias", f"{router}.logit_bias_HE", "E = 0 E")
        yield from interleaved_expert_rows(f"{theirs}.mlp.experts", f"{ours}.ffn.experts")

    return decoder_rows(config, feed_forward)


def _is_windowed(values: Values, layer: int) -> bool:
    return layer % 2 == 0


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=(
        *decoder_keys(eps=1e-5, max_len=131_072, rope=_YARN),
        Key("head_dim", "d_head", 64),
        Key("intermediate_size", "moe.d_expert", 2880),
        Key("num_local_experts num_experts", "moe.n_experts", 128),
        Key("num_experts_per_tok experts_per_token", "moe.top_k", 4),
        Key("attention_bias", "qkv_bias", True),
        Key("attention_bias", "o_bias", True),
        Key("hidden_act", "moe.activation", "silu", values=(("silu", "swiglu_clamped"),)),
        constant("swiglu_alpha", 1.702),
        constant("swiglu_limit", 7.0),
        layer_windows(_is_windowed, always=True, width=128),
    ),
    rows=_rows,
    fixed={
        "qk_norm": "none",
        "sinks": True,
        "moe.kind": "moe",
        "moe.expert_bias": True,
        "moe.router.logit_bias": True,
        "moe.router.gate": "softmax_topk",
        "moe.router.renormalize": True,
    },
)
