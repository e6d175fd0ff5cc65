"""Tiny random checkpoints of every family, written by Transformers."""

import json
from pathlib import Path

import pytest
import torch

from headway.data.tokenizer import train_bpe

BASE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
    "rope_parameters": YARN,
}
CONFIGS = {
    "llama": {"tie_word_embeddings": True, "head_dim": 16, "attention_bias": True},
    "qwen3": {"head_dim": 16},
    "olmoe": {**MOE, "clip_qkv": 0.5},
    "qwen3_moe": {
        **MOE,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "mixtral": {"num_local_experts": 4, "rope_theta": 5e4},
    "glm4_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "n_group": 4,
        "topk_group": 2,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "qwen2_moe": {
        **MOE,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "head_dim": 16,
        "sliding_window": 6,
    },
    "deepseek_v2": {**DEEPSEEK, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
    "deepseek_v3": {**DEEPSEEK, "n_shared_experts": 1},
}
"""Family → what its config has beside BASE."""


def write_model(folder: Path, family: str, dtype=torch.float32, seed=0, fused=False, **changes):
    """A checkpoint with weights, norms and biases drawn at random, and a tokenizer of 300 ids;
    return Transformers' model. `changes` are of the config, or `max_shard_size`."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shards = {k: changes.pop(k) for k in ("max_shard_size",) if k in changes}
    config = transformers.AutoConfig.for_model(family, **{**BASE, **CONFIGS[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            spread = 0.3 if "norm" in name else 0.15
            drawn = torch.randn(x.shape, generator=generator) * spread
            x.copy_(drawn + 1 if "norm" in name else drawn)
    model.to(dtype).save_pretrained(folder, save_original_format=not fused, **shards)
    train_bpe(
        ["the cat sat on the mat, def f(x): return x + 1 日本 "] * 30,
        300,
        folder / "tokenizer.json",
    )
    return model


def change_config(folder: Path, **changes) -> None:
    """Change or (None in place of a value: …) remove entries of config.json."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values.pop(name, None)
        if value is not ...:
            values[name] = value
    path.write_text(json.dumps(values))
