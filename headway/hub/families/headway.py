"""Models that no published family can express, such as LatentMoE and Multi-Head LatentMoE, for
Transformers with the code that lies in the folder (`hub/remote`).

The experts of all heads are one stack: expert e of head h is number h·E + e. Gate and up projection
are one matrix, dense or not."""

from collections.abc import Iterator
from dataclasses import asdict

from headway.config import ModelConfig, RopeConfig
from headway.hub.decoder import decoder_rows
from headway.hub.family import Family, Key, Keys, Values, lookup
from headway.hub.layout import Row


def _rows(config: ModelConfig, fused: bool) -> Iterator[Row]:
    def feed_forward(theirs: str, layer: int) -> Iterator[Row]:
        if config.attn_gate:
            yield Row(f"{theirs}.self_attn.gate.weight", f"layers.{layer}.mixer.gate.weight")
        if config.sinks:
            yield Row(f"{theirs}.self_attn.sinks", f"layers.{layer}.mixer.sinks_N")
        theirs, ours = f"{theirs}.mlp", f"layers.{layer}.ffn"
        if config.is_sparse(layer):
            yield from _sparse_rows(config, theirs, ours)
        else:
            yield from _dense_rows(theirs, ours)

    return decoder_rows(config, feed_forward)


def _dense_rows(theirs: str, ours: str) -> Iterator[Row]:
    yield Row(f"{theirs}.gate_up_proj.weight", f"{ours}.w_in.weight")
    yield Row(f"{theirs}.down_proj.weight", f"{ours}.w_out.weight")


def _sparse_rows(config: ModelConfig, theirs: str, ours: str) -> Iterator[Row]:
    moe, experts = config.moe, f"{theirs}.head_experts"
    if moe.projects:
        yield Row(f"{theirs}.in_proj.weight", f"{ours}.w_in.weight")
        yield Row(f"{theirs}.out_proj.weight", f"{ours}.w_out.weight")
    if moe.is_latent and moe.latent_norm:
        yield Row(f"{theirs}.norm.weight", f"{ours}.norm.weight")
    yield Row(f"{theirs}.router.weight", f"{ours}.router.w_HEL")
    yield Row(f"{theirs}.router.e_score_correction_bias", f"{ours}.router.bias_HE")
    if moe.router.logit_bias:
        yield Row(f"{theirs}.router.bias", f"{ours}.router.logit_bias_HE")
    w_in, w_out = f"{ours}.experts.w_in_HEGFL", f"{ours}.experts.w_out_HEFL"
    yield Row(f"{experts}.gate_up_proj", w_in, "(H E) (G F) L = H E G F L")
    yield Row(f"{experts}.down_proj", w_out, "(H E) L F = H E F L")
    if moe.expert_bias:
        b_in, b_out = f"{ours}.experts.b_in_HEGF", f"{ours}.experts.b_out_HEL"
        yield Row(f"{experts}.gate_up_proj_bias", b_in, "(H E) (G F) = H E G F")
        yield Row(f"{experts}.down_proj_bias", b_out, "(H E) L = H E L")
    if moe.d_shared:
        yield from _dense_rows(f"{theirs}.shared_expert", f"{ours}.shared")
    if moe.shared_gate:
        yield Row(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared_gate.weight")


def _write_windows(ours: Values) -> Values:
    windows, n = ours["window"] or (0,), ours["n_layers"]
    return {"windows": [windows[i % len(windows)] for i in range(n)]}


def _write_dense_layers(ours: Values) -> Values:
    return {"mlp_only_layers": [*range(ours["moe.n_dense_layers"]), *ours["moe.dense_layers"]]}


def _read_rotary(values: Values) -> Values:
    return {f"rope.{name}": value for name, value in lookup(values, "rotary", {}).items()}


def _write_rotary(ours: Values) -> Values:
    return {"rotary": {name: ours[f"rope.{name}"] for name in asdict(RopeConfig())}}


_GROUPS = ("n_groups", "top_k_groups", "group_best")


def _read_groups(values: Values) -> Values:
    given = lookup(values, "router_groups", (1, 1, 1))
    return {f"moe.router.{name}": n for name, n in zip(_GROUPS, given, strict=True)}


def _write_groups(ours: Values) -> Values:
    return {"router_groups": [ours[f"moe.router.{name}"] for name in _GROUPS]}


HEADWAY = Family(
    name="headway",
    architecture="HeadwayForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "d_model"),
        Key("num_hidden_layers", "n_layers"),
        Key("num_attention_heads", "n_heads"),
        Key("num_key_value_heads", "n_kv_heads"),
        Key("head_dim", "d_head"),
        Key("max_position_embeddings", "max_len"),
        Key("rms_norm_eps", "norm_eps"),
        Key("tie_word_embeddings", "tied"),
        Key("rope_theta", "rope_theta"),
        Key("qk_norm", "qk_norm"),
        Key("clip_qkv", "clip_qkv"),
        Key("qkv_bias", "qkv_bias"),
        Key("o_bias", "o_bias"),
        Key("attn_gate", "attn_gate"),
        Key("attention_sinks", "sinks", False),
        Keys("rotary", _read_rotary, _write_rotary),
        Keys(
            "windows sliding_window layer_types",  # the last two say it again for caches
            lambda values: {"window": [*lookup(values, "windows")]},
            _write_windows,
        ),
        Key("final_logit_softcapping", "logit_softcap", 0.0, zero_is_null=True),
        Key("intermediate_size", "d_ff"),
        Key("activation", "activation"),
        Key("moe_kind", "moe.kind"),
        Keys(
            "mlp_only_layers",
            lambda values: {"moe.dense_layers": [*lookup(values, "mlp_only_layers")]},
            _write_dense_layers,
        ),
        Key("moe_num_heads", "moe.n_heads"),
        Key("moe_latent_size", "moe.d_latent", 0),
        Key("moe_latent_norm", "moe.latent_norm"),
        Key("moe_projection", "moe.projection", "learned"),
        Key("num_experts", "moe.n_experts"),
        Key("num_zero_experts", "moe.n_zero_experts"),
        Key("num_experts_per_tok", "moe.top_k"),
        Key("moe_intermediate_size", "moe.d_expert"),
        Key("moe_activation", "moe.activation"),
        Key("moe_expert_bias", "moe.expert_bias", False),
        Key("shared_expert_intermediate_size", "moe.d_shared"),
        Key("shared_expert_gate", "moe.shared_gate"),
        Key("scoring_func", "moe.router.gate"),
        Key("norm_topk_prob", "moe.router.renormalize"),
        Key("routed_scaling_factor", "moe.router.scale"),
        Key("router_reads", "moe.router.reads"),
        Key("router_bias", "moe.router.logit_bias", False),
        Keys("router_groups", _read_groups, _write_groups),
    ),
    rows=_rows,
    router_bias=True,
    float32=r"norm|router\.",
)
