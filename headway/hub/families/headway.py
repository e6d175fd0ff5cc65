"""`headway`: all that a `ModelConfig` says, for Transformers with the code that lies in the folder
(`hub/remote`).

Both tables are read in both directions. The experts of all heads are one stack: expert e of head h
is number h·E + e."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from torch import Tensor

from headway.config import ModelConfig, UsageError, from_dict, leaves

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "d_head",
    "qk_norm": "qk_norm",
    "clip_qkv": "clip_qkv",
    "qkv_bias": "qkv_bias",
    "o_bias": "o_bias",
    "attn_gate": "attn_gate",
    "windows": "window",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "final_logit_softcapping": "logit_softcap",
    "tie_word_embeddings": "tied",
    "intermediate_size": "d_ff",
    "activation": "activation",
    "moe_kind": "moe.kind",
    "mlp_only_layers": "moe.dense_layers",
    "moe_num_heads": "moe.n_heads",
    "moe_latent_size": "moe.d_latent",
    "moe_latent_norm": "moe.latent_norm",
    "num_experts": "moe.n_experts",
    "num_zero_experts": "moe.n_zero_experts",
    "num_experts_per_tok": "moe.top_k",
    "moe_intermediate_size": "moe.d_expert",
    "moe_activation": "moe.activation",
    "shared_expert_intermediate_size": "moe.d_shared",
    "shared_expert_gate": "moe.shared_gate",
    "scoring_func": "moe.router.gate",
    "norm_topk_prob": "moe.router.renormalize",
    "routed_scaling_factor": "moe.router.scale",
    "router_reads": "moe.router.reads",
}
"""Key of config.json → field of `ModelConfig`."""

TRAINING = ("moe.balance.", "moe.router.noisy", "moe.router.jitter", "moe.capacity_factor")
"""Fields that change no number of a trained model in use: they stay behind."""


class Row(NamedTuple):
    """One tensor."""

    theirs: str
    ours: str
    to_theirs: Callable[[Tensor], Tensor] = lambda w: w
    to_ours: Callable[[Tensor, tuple[int, ...]], Tensor] = lambda w, shape: w.reshape(shape)
    """The inverse, into a shape."""


MODEL = (
    Row("model.embed_tokens.weight", "embed.weight"),
    Row("model.norm.weight", "norm.weight"),
    Row("lm_head.weight", "head.weight"),
)
LAYER = (
    Row("input_layernorm.weight", "norm1.weight"),
    Row("self_attn.q_proj.weight", "mixer.q.weight"),
    Row("self_attn.k_proj.weight", "mixer.k.weight"),
    Row("self_attn.v_proj.weight", "mixer.v.weight"),
    Row("self_attn.o_proj.weight", "mixer.o.weight"),
    Row("self_attn.q_proj.bias", "mixer.q.bias"),
    Row("self_attn.k_proj.bias", "mixer.k.bias"),
    Row("self_attn.v_proj.bias", "mixer.v.bias"),
    Row("self_attn.o_proj.bias", "mixer.o.bias"),
    Row("self_attn.q_norm.weight", "mixer.q_norm.weight"),
    Row("self_attn.k_norm.weight", "mixer.k_norm.weight"),
    Row("self_attn.gate.weight", "mixer.gate.weight"),
    Row("post_attention_layernorm.weight", "norm2.weight"),
    Row("mlp.gate_up_proj.weight", "ffn.w_in.weight"),
    Row("mlp.down_proj.weight", "ffn.w_out.weight"),
)
"""Of a block; the last two where it is dense."""
SPARSE = (
    *LAYER[:-2],
    Row("mlp.in_proj.weight", "ffn.w_in.weight"),
    Row("mlp.norm.weight", "ffn.norm.weight"),
    Row("mlp.router.weight", "ffn.router.w_HEL"),
    Row("mlp.router.e_score_correction_bias", "ffn.router.bias_HE"),
    Row(
        "mlp.head_experts.gate_up_proj",
        "ffn.experts.w_in_HEGFL",
        lambda w: w.flatten(0, 1).flatten(1, 2),
    ),
    Row(
        "mlp.head_experts.down_proj",
        "ffn.experts.w_out_HEFL",
        lambda w: w.flatten(0, 1).transpose(1, 2),
        lambda w, shape: w.transpose(1, 2).reshape(shape),
    ),
    Row("mlp.shared_expert.gate_up_proj.weight", "ffn.shared.w_in.weight"),
    Row("mlp.shared_expert.down_proj.weight", "ffn.shared.w_out.weight"),
    Row("mlp.shared_expert_gate.weight", "ffn.shared_gate.weight"),
    Row("mlp.out_proj.weight", "ffn.w_out.weight"),
)


def rows(config: ModelConfig) -> Iterator[Row]:
    """Yield the rows that a model may have, with full names."""
    yield from MODEL
    for i in range(config.n_layers):
        for row in SPARSE if config.is_sparse(i) else LAYER:
            theirs, ours = f"model.layers.{i}.{row.theirs}", f"layers.{i}.{row.ours}"
            yield row._replace(theirs=theirs, ours=ours)


def to_config(model: ModelConfig) -> dict[str, Any]:
    """Return config.json of a model, without what names files and dtypes. Raises UsageError,
    naming the field, for a model that needs one that has no key."""
    moe = model.moe
    dense_layers = tuple(i for i in range(model.n_layers) if not model.is_sparse(i))
    resolved = replace(
        model,
        n_kv_heads=model.kv_heads,
        d_head=model.head_width,
        window=tuple(map(model.window_of, range(model.n_layers))),
        moe=replace(
            moe,
            d_latent=moe.latent_width(model.d_model),
            dense_layers=() if moe.kind == "dense" else dense_layers,
            n_dense_layers=0,
            sparse_step=1,
            router=replace(moe.router, reads="token" if moe.reads_token else "sub_token"),
        ),
    )
    ours, plain = leaves(asdict(resolved)), leaves(asdict(ModelConfig()))
    for name, value in ours.items():
        free = (
            name in KEYS.values()
            or name.startswith(TRAINING)
            or name in ("max_len", "moe.precision")
        )
        if not free and value != plain[name]:
            raise UsageError(
                f"model.{name}={value} has no key in a headway folder; export --as the family "
                "that has it"
            )
    config = {theirs: ours[name] for theirs, name in KEYS.items()}
    return {"model_type": "headway", **config}


def to_model(config: dict[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` of a config.json; the inverse of `to_config`."""
    tree: dict[str, Any] = {}
    for theirs, name in KEYS.items():
        *path, leaf = name.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = config[theirs]
    if tree["moe"]["kind"] == "moe":
        tree["moe"]["d_latent"] = 0
    if not any(tree["window"]):
        tree["window"] = ()
    return from_dict(ModelConfig, tree)
