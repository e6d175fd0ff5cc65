"""OLMoE (arXiv 2409.02060): QK-norm over all heads, gates by default not renormalised."""

from collections.abc import Iterator

from headway.config import ModelConfig
from headway.hub.decoder import SILU, decoder_keys, decoder_rows, sparse_rows
from headway.hub.family import Family, Key
from headway.hub.layout import Row


def _rows(config: ModelConfig, fused: bool) -> Iterator[Row]:
    def feed_forward(theirs: str, layer: int) -> Iterator[Row]:
        return sparse_rows(config, theirs, layer, fused)

    return decoder_rows(config, feed_forward)


OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    keys=(
        *decoder_keys(eps=1e-5, max_len=4096),
        Key("intermediate_size", "moe.d_expert"),
        Key("hidden_act", "moe.activation", "silu", values=SILU),
        Key("num_experts num_local_experts", "moe.n_experts", 64),
        Key("num_experts_per_tok", "moe.top_k", 8),
        Key("norm_topk_prob", "moe.router.renormalize", False),
        Key("clip_qkv", "clip_qkv", 0.0, zero_is_null=True),
        Key("attention_bias", "qkv_bias", False),
        Key("attention_bias", "o_bias", False),
    ),
    rows=_rows,
    fixed={"qk_norm": "all", "moe.kind": "moe", "moe.router.gate": "softmax_topk"},
)
