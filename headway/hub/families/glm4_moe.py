"""GLM-4.5 (arXiv 2508.06471): sigmoid router with a bias on the selection, a shared expert, dense
first layers, half of each head rotated."""

from collections.abc import Iterator

from headway.config import ModelConfig
from headway.hub.decoder import (
    SILU,
    decoder_keys,
    decoder_rows,
    first_dense,
    selection_bias_row,
    shared_experts,
    sparse_rows,
)
from headway.hub.family import Family, Key
from headway.hub.layout import Row, dense_rows


def _rows(config: ModelConfig, fused: bool) -> Iterator[Row]:
    def feed_forward(theirs: str, layer: int) -> Iterator[Row]:
        yield from sparse_rows(config, theirs, layer, fused)
        if config.is_sparse(layer):
            yield selection_bias_row(theirs, layer)
            yield from dense_rows(f"{theirs}.mlp.shared_experts", f"layers.{layer}.ffn.shared")

    return decoder_rows(config, feed_forward)


GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys=(
        *decoder_keys(eps=1e-5, max_len=131_072, partial=0.5),
        Key("head_dim", "d_head", 0),
        Key("use_qk_norm", "qk_norm", False, values=((True, "head"), (False, "none"))),
        Key("attention_bias", "qkv_bias", False),
        Key("intermediate_size", "d_ff", 10_944),
        Key("moe_intermediate_size", "moe.d_expert", 1408),
        Key("hidden_act", "activation", "silu", values=SILU),
        Key("hidden_act", "moe.activation", "silu", values=SILU),
        Key("n_routed_experts num_local_experts num_experts", "moe.n_experts", 128),
        Key("num_experts_per_tok", "moe.top_k", 8),
        Key("norm_topk_prob", "moe.router.renormalize", True),
        Key("routed_scaling_factor", "moe.router.scale", 1.0),
        Key("n_group", "moe.router.n_groups", 1),
        Key("topk_group", "moe.router.top_k_groups", 1),
        first_dense(1),
        shared_experts(1),
    ),
    rows=_rows,
    fixed={"moe.kind": "moe", "moe.router.gate": "sigmoid", "moe.router.group_best": 2},
    router_bias=True,
)
