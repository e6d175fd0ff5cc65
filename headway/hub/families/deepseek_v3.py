"""DeepSeek-V3 and R1 (arXiv 2412.19437): latent attention, a sigmoid router with a bias on the
selection, the best groups of experts by their two best, weights in FP8."""

from collections.abc import Iterator

from headway.config import ModelConfig
from headway.hub.decoder import (
    SILU,
    constant,
    decoder_keys,
    decoder_rows,
    first_dense,
    selection_bias_row,
    shared_experts,
    sparse_rows,
)
from headway.hub.families.deepseek_v2 import latent_attention_keys, latent_attention_rows
from headway.hub.family import Family, Key
from headway.hub.layout import Row, dense_rows


def _rows(config: ModelConfig, fused: bool) -> Iterator[Row]:
    def feed_forward(theirs: str, layer: int) -> Iterator[Row]:
        yield from sparse_rows(config, theirs, layer, fused)
        if config.is_sparse(layer):
            yield selection_bias_row(theirs, layer)
            yield from dense_rows(f"{theirs}.mlp.shared_experts", f"layers.{layer}.ffn.shared")

    return decoder_rows(config, feed_forward, latent_attention_rows)


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=(
        *decoder_keys(max_len=4096),
        *latent_attention_keys(),
        Key("rope_interleave", "rope.interleaved", True),
        Key("intermediate_size", "d_ff", 18_432),
        Key("moe_intermediate_size", "moe.d_expert", 2048),
        Key("hidden_act", "activation", "silu", values=SILU),
        Key("hidden_act", "moe.activation", "silu", values=SILU),
        Key("n_routed_experts num_experts num_local_experts", "moe.n_experts", 256),
        Key("num_experts_per_tok", "moe.top_k", 8),
        Key("norm_topk_prob", "moe.router.renormalize", True),
        Key("routed_scaling_factor", "moe.router.scale", 2.5),
        Key("n_group", "moe.router.n_groups", 8),
        Key("topk_group", "moe.router.top_k_groups", 4),
        first_dense(3),
        shared_experts(1),
        constant("topk_method", "noaux_tc"),
        constant("scoring_func", "sigmoid"),
        constant("moe_layer_freq", 1),
    ),
    rows=_rows,
    fixed={
        "mixer": "mla",
        "moe.kind": "moe",
        "moe.router.gate": "sigmoid",
        "moe.router.group_best": 2,
    },
    router_bias=True,
)
