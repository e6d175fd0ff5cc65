"""What the families share: the keys and tensors of a decoder with RMSNorm, rotary embedding and
grouped-query attention."""

from collections.abc import Callable, Iterator
from typing import Any

from headway.config import ModelConfig, UsageError
from headway.config.rope import SCALING_FIELDS
from headway.hub.family import REQUIRED, Key, Keys, Values, lookup
from headway.hub.layout import Row, dense_rows, expert_rows, fused_expert_rows

SILU = (("silu", "swiglu"),)
"""`hidden_act` of gated networks."""


def constant(theirs: str, value: Any) -> Keys:
    """Return a key that must have one value, since we have no option for another."""

    def read(values: Values) -> Values:
        if (other := lookup(values, theirs, value)) != value:
            raise UsageError(f"config.json has {theirs}={other}, and only {value} is known")
        return {}

    return Keys(theirs, read, lambda _: {theirs: value})


_ROPE = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_len",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""Their entry of `rope_parameters` → our field of `RopeConfig`."""


def rope_keys(
    theta: float = 10_000.0, partial: float | None = None, absent: Values | None = None
) -> Keys:
    """Return the keys of rotary embedding: `rope_theta` and `rope_scaling` of Transformers 4, and
    `rope_parameters` of 5.

    Args:
        theta: base where config.json has none.
        partial: `partial_rotary_factor` where config.json has none; None: the family has none.
        absent: `rope_parameters` where config.json has nothing of it."""
    spellings = ("rope_theta", "rope_scaling", "rope_parameters")
    above = ["rope_theta"] if partial is None else ["rope_theta", "partial_rotary_factor"]

    def read(values: Values) -> Values:
        given: dict[str, Any] = {}
        if absent and not any(values.get(name) for name in spellings):
            given.update(absent)
        parts = ({name: values.get(name) for name in above}, values.get("rope_scaling"))
        for part in (*parts, values.get("rope_parameters")):
            for name, value in (part or {}).items():
                name = "rope_type" if name == "type" else name
                if value is not None and given.setdefault(name, value) != value:
                    raise UsageError(f"config.json has {name}={given[name]} and {value}; keep one")
        kind, base = given.pop("rope_type", "default"), given.pop("rope_theta", theta)
        scaling = "none" if kind == "default" else kind
        if scaling not in SCALING_FIELDS:
            known = "default, linear, llama3 and yarn"
            raise UsageError(f"config.json has rope_type={kind}, and only {known} are known")
        fields = {"rope_theta": float(base), "rope.scaling": scaling}
        if partial is not None and (share := given.pop("partial_rotary_factor", partial)) != 1.0:
            fields["rope.rotary_dim"] = int(head_dim(values) * share)
        for name, value in given.items():
            if _ROPE.get(name) not in SCALING_FIELDS[scaling]:
                raise UsageError(
                    f"config.json has {name}={value!r}, which is not known with rope_type={kind}"
                )
            fields[f"rope.{_ROPE[name]}"] = value
        if "original_max_len" in SCALING_FIELDS[scaling]:
            fields.setdefault("rope.original_max_len", values.get("max_position_embeddings"))
        return fields

    def write(ours: Values) -> Values:
        scaling = ours["rope.scaling"]
        names = {a: b for a, b in _ROPE.items() if b in SCALING_FIELDS[scaling]}
        given: dict[str, Any] = {"rope_type": "default" if scaling == "none" else scaling}
        for theirs, name in names.items():
            value = ours[f"rope.{name}"]
            if bool(value) != (name == "truncate"):  # 0, and to truncate: not given
                given[theirs] = value
        base: dict[str, Any] = {"rope_theta": ours["rope_theta"]}
        if partial is not None:
            rotated = ours["rope.rotary_dim"] or ours["d_head"]
            base["partial_rotary_factor"] = rotated / ours["d_head"]
        scaled = {"rope_scaling": given if names else None}
        return {**base, **scaled, "rope_parameters": {**base, **given}}

    return Keys(" ".join([*above, "rope_scaling", "rope_parameters"]), read, write)


def head_dim(values: Values) -> int:
    """Return the width of an attention head."""
    width = lookup(values, "hidden_size") // lookup(values, "num_attention_heads")
    return lookup(values, "head_dim", width)


def decoder_keys(
    *,
    eps: float = 1e-6,
    theta: float = 10_000.0,
    tied: bool = False,
    max_len: Any = REQUIRED,
    partial: float | None = None,
    rope: Values | None = None,
) -> tuple[Key | Keys, ...]:
    """Return the keys of every family. The arguments are its defaults in Transformers."""
    return (
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "d_model"),
        Key("num_hidden_layers", "n_layers"),
        Key("num_attention_heads", "n_heads"),
        Key("num_key_value_heads", "n_kv_heads", 0),
        Key("max_position_embeddings", "max_len", max_len),
        Key("rms_norm_eps", "norm_eps", eps),
        Key("tie_word_embeddings", "tied", tied),
        rope_keys(theta, partial, rope),
    )


def placement() -> Keys:
    """Return the keys that say which layers are sparse: every `decoder_sparse_step`-th, without
    `mlp_only_layers`."""

    def read(values: Values) -> Values:
        step, dense = (
            lookup(values, "decoder_sparse_step", 1),
            lookup(values, "mlp_only_layers", []),
        )
        return {"moe.sparse_step": step, "moe.dense_layers": [*dense]}

    def write(ours: Values) -> Values:
        dense = [*range(ours["moe.n_dense_layers"]), *ours["moe.dense_layers"]]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    return Keys("decoder_sparse_step mlp_only_layers", read, write)


def first_dense(default: int) -> Key:
    """Return the key that says how many layers, the first ones, are dense."""
    return Key("first_k_dense_replace", "moe.n_dense_layers", default)


def shared_experts(default: int) -> Keys:
    """Return the key that says how many shared experts, as wide as the others, run together."""

    def read(values: Values) -> Values:
        n = lookup(values, "n_shared_experts", default)
        return {"moe.d_shared": n * lookup(values, "moe_intermediate_size")}

    def write(ours: Values) -> Values:  # a width that is no multiple comes back as another one
        return {"n_shared_experts": max(1, ours["moe.d_shared"] // ours["moe.d_expert"])}

    return Keys("n_shared_experts moe_intermediate_size", read, write)


def layer_windows(
    is_windowed: Callable[[Values, int], bool], always: bool = False, width: int = 4096
) -> Keys:
    """Return the keys of windows by layer: `layer_types`, or without it `is_windowed(values,
    layer)`; unless `always`, where `use_sliding_window` is set. `width` is the default."""
    switch = {} if always else {"use_sliding_window": True}

    def read(values: Values) -> Values:
        if switch and not lookup(values, "use_sliding_window", False):
            return {"window": []}
        tokens, n = lookup(values, "sliding_window", width), lookup(values, "num_hidden_layers")
        kinds = lookup(values, "layer_types", [])
        windowed = [kind == "sliding_attention" for kind in kinds]
        windowed = windowed or [is_windowed(values, layer) for layer in range(n)]
        return {"window": [tokens if wanted else 0 for wanted in windowed]}

    def write(ours: Values) -> Values:
        n, window = ours["n_layers"], ours["window"]
        widths = [window[i % len(window)] if window else 0 for i in range(n)]
        return {
            **dict.fromkeys(switch, any(widths)),
            **({} if always else {"max_window_layers": n}),
            "sliding_window": max(widths) or None,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in widths],
        }

    names = "sliding_window layer_types"
    return Keys(names if always else f"use_sliding_window max_window_layers {names}", read, write)


def attention_rows(config: ModelConfig, theirs: str, ours: str) -> Iterator[Row]:
    """Yield the tensors of grouped-query attention that `config` has."""
    for name in "qkvo":
        yield Row(f"{theirs}.{name}_proj.weight", f"{ours}.{name}.weight")
        if config.o_bias if name == "o" else config.qkv_bias:
            yield Row(f"{theirs}.{name}_proj.bias", f"{ours}.{name}.bias")
    if config.qk_norm != "none":
        for name in "qk":
            yield Row(f"{theirs}.{name}_norm.weight", f"{ours}.{name}_norm.weight")


def decoder_rows(
    config: ModelConfig,
    feed_forward: Callable[[str, int], Iterator[Row]],
    attention: Callable[[ModelConfig, str, str], Iterator[Row]] = attention_rows,
) -> Iterator[Row]:
    """Yield the tensors of a decoder: `attention(config, theirs, ours)` those of a mixer,
    `feed_forward(prefix, layer)` those of a feed-forward layer, `prefix` being `model.layers.N`."""
    yield Row("model.embed_tokens.weight", "embed.weight")
    for layer in range(config.n_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        yield Row(f"{theirs}.input_layernorm.weight", f"{ours}.norm1.weight")
        yield from attention(config, f"{theirs}.self_attn", f"{ours}.mixer")
        yield Row(f"{theirs}.post_attention_layernorm.weight", f"{ours}.norm2.weight")
        yield from feed_forward(theirs, layer)
    yield Row("model.norm.weight", "norm.weight")
    if not config.tied:
        yield Row("lm_head.weight", "head.weight")


def sparse_rows(config: ModelConfig, theirs: str, layer: int, fused: bool) -> Iterator[Row]:
    """Yield router and experts of a sparse layer whose names are `mlp.gate` and `mlp.experts`, or
    the dense network of a layer that is not sparse."""
    ours = f"layers.{layer}.ffn"
    if not config.is_sparse(layer):
        yield from dense_rows(f"{theirs}.mlp", ours)
        return
    yield Row(f"{theirs}.mlp.gate.weight", f"{ours}.router.w_HEL", "E D = 0 E D")
    if fused:
        yield from fused_expert_rows(f"{theirs}.mlp.experts", f"{ours}.experts")
    else:
        n_experts = config.moe.n_experts
        yield from expert_rows(f"{theirs}.mlp.experts", f"{ours}.experts", n_experts)


def selection_bias_row(theirs: str, layer: int) -> Row:
    """Return the bias on the selection of a sigmoid router, a buffer in float32."""
    name = f"{theirs}.mlp.gate.e_score_correction_bias"
    return Row(name, f"layers.{layer}.ffn.router.bias_HE", "E = 0 E")
