"""DeepSeek-V2 (arXiv 2405.04434): latent attention, a router limited to groups of experts, shared
experts, dense first layers."""

from collections.abc import Iterator

from headway.config import ModelConfig, UsageError
from headway.hub.decoder import (
    SILU,
    constant,
    decoder_keys,
    decoder_rows,
    first_dense,
    shared_experts,
    sparse_rows,
)
from headway.hub.family import Family, Key, Keys, Values, lookup
from headway.hub.layout import Row, dense_rows


def latent_attention_rows(config: ModelConfig, theirs: str, ours: str) -> Iterator[Row]:
    """Yield the tensors of multi-head latent attention."""
    if config.mla.q_lora_rank:
        yield from _projection(f"{theirs}.q_a_proj", f"{ours}.q_a", config.qkv_bias)
        yield Row(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_a_norm.weight")
        yield Row(f"{theirs}.q_b_proj.weight", f"{ours}.q_b.weight")
    else:
        yield Row(f"{theirs}.q_proj.weight", f"{ours}.q_b.weight")
    yield from _projection(f"{theirs}.kv_a_proj_with_mqa", f"{ours}.kv_a", config.qkv_bias)
    yield Row(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_a_norm.weight")
    yield Row(f"{theirs}.kv_b_proj.weight", f"{ours}.kv_b.weight")
    yield from _projection(f"{theirs}.o_proj", f"{ours}.o", config.o_bias)


def _projection(theirs: str, ours: str, bias: bool) -> Iterator[Row]:
    yield Row(f"{theirs}.weight", f"{ours}.weight")
    if bias:
        yield Row(f"{theirs}.bias", f"{ours}.bias")


def latent_attention_keys(q_lora_rank: int = 1536) -> tuple[Key | Keys, ...]:
    """Return the keys of multi-head latent attention. `q_lora_rank` is the default; null is a
    value of its own, queries without a latent vector."""

    def read_rank(values: Values) -> Values:
        return {"mla.q_lora_rank": values.get("q_lora_rank", q_lora_rank) or 0}

    def write_rank(ours: Values) -> Values:
        return {"q_lora_rank": ours["mla.q_lora_rank"] or None}

    def read_width(values: Values) -> Values:
        rotated = lookup(values, "qk_rope_head_dim", 64)
        if (width := lookup(values, "head_dim", rotated)) != rotated:
            raise UsageError(f"config.json has head_dim={width} and qk_rope_head_dim={rotated}")
        return {}

    return (
        Keys("q_lora_rank", read_rank, write_rank),
        Key("kv_lora_rank", "mla.kv_lora_rank", 512),
        Key("qk_nope_head_dim", "mla.qk_nope_head_dim", 128),
        Key("qk_rope_head_dim", "mla.qk_rope_head_dim", 64),
        Key("v_head_dim", "mla.v_head_dim", 128),
        Keys("head_dim qk_head_dim", read_width, lambda _: {}),
        Key("attention_bias", "qkv_bias", False),
        Key("attention_bias", "o_bias", False),
    )


def _rows(config: ModelConfig, fused: bool) -> Iterator[Row]:
    def feed_forward(theirs: str, layer: int) -> Iterator[Row]:
        yield from sparse_rows(config, theirs, layer, fused)
        if config.is_sparse(layer):
            yield from dense_rows(f"{theirs}.mlp.shared_experts", f"layers.{layer}.ffn.shared")

    return decoder_rows(config, feed_forward, latent_attention_rows)


def _read_groups(values: Values) -> Values:
    match lookup(values, "topk_method", "greedy"):
        case "greedy":
            return {}
        case "group_limited_greedy":
            n, best = (lookup(values, name) for name in ("n_group", "topk_group"))
            return {"moe.router.n_groups": n, "moe.router.top_k_groups": best}
        case method:
            raise UsageError(
                f"config.json has topk_method={method}, and only greedy and group_limited_greedy "
                "are known"
            )


def _write_groups(ours: Values) -> Values:
    n, best = ours["moe.router.n_groups"], ours["moe.router.top_k_groups"]
    method = "group_limited_greedy" if n > 1 else "greedy"
    return {"topk_method": method, "n_group": n, "topk_group": best}


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys=(
        *decoder_keys(max_len=2048),
        *latent_attention_keys(),
        Key("intermediate_size", "d_ff", 11_008),
        Key("moe_intermediate_size", "moe.d_expert"),
        Key("hidden_act", "activation", "silu", values=SILU),
        Key("hidden_act", "moe.activation", "silu", values=SILU),
        Key("n_routed_experts num_experts", "moe.n_experts", 64),
        Key("num_experts_per_tok", "moe.top_k"),
        Key("routed_scaling_factor", "moe.router.scale", 1.0),
        Keys("topk_method n_group topk_group", _read_groups, _write_groups),
        first_dense(0),
        shared_experts(2),
        constant("norm_topk_prob", False),
        constant("scoring_func", "softmax"),
        constant("moe_layer_freq", 1),
        constant("mlp_bias", False),
    ),
    rows=_rows,
    fixed={
        "mixer": "mla",
        "rope.interleaved": True,
        "moe.kind": "moe",
        "moe.router.gate": "softmax_topk",
    },
)
