"""Run folders with random weights, one of each kind of model, without training."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from headway.checkpoint.save import plan_save, write_checkpoint
from headway.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RopeConfig,
    RouterConfig,
)
from headway.hub.export import Exported, export_hf
from headway.hub.trained import open_trained
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers

SMALL = ModelConfig(vocab_size=320, n_layers=2, d_model=32, n_heads=4, d_ff=48)


def _model(moe: MoEConfig, **changes) -> ModelConfig:
    return replace(SMALL, moe=replace(moe, n_experts=6, d_expert=16), **changes)


MULTI_HEAD = MoEConfig(n_heads=2, top_k=2)
MODELS = {
    "multi_head": _model(MULTI_HEAD),
    "multi_head_token": _model(
        replace(
            MULTI_HEAD,
            d_latent=64,
            d_shared=24,
            top_k=3,
            router=RouterConfig(reads="token", scale=1.5),
        ),
        attn_gate=True,
        n_kv_heads=2,
        d_head=12,
    ),
    "slices": _model(replace(MULTI_HEAD, projection="none")),
    "latent": _model(
        MoEConfig(
            kind="latent",
            d_latent=16,
            top_k=2,
            activation="relu2",
            n_dense_layers=1,
            router=RouterConfig(gate="sigmoid", renormalize=True, scale=2.5),
        ),
        window=(0, 4),
        tied=True,
        qk_norm="none",
    ),
    "latent_sub_token": _model(
        MoEConfig(
            kind="latent",
            top_k=1,
            latent_norm=False,
            router=RouterConfig("sigmoid", reads="sub_token"),
        ),
        activation="relu2",
        qk_norm="all",
        clip_qkv=0.5,
        qkv_bias=True,
        o_bias=True,
    ),
    "flat": _model(
        MoEConfig(
            kind="moe",
            n_zero_experts=3,
            top_k=4,
            activation="gelu",
            d_shared=16,
            shared_gate=True,
            router=RouterConfig(gate="softmax_topk"),
        ),
        logit_softcap=5.0,
        window=(4, 6),
    ),
    "dense": _model(MoEConfig(kind="dense"), activation="gelu"),
    "gpt_oss_heads": _model(
        replace(
            MULTI_HEAD,
            activation="swiglu_clamped",
            expert_bias=True,
            router=RouterConfig(logit_bias=True, n_groups=3, top_k_groups=2, group_best=2),
        ),
        sinks=True,
        qkv_bias=True,
        n_kv_heads=2,
        window=(0, 5),
        rope=RopeConfig(
            scaling="yarn", factor=4.0, original_max_len=8, beta_fast=4.0, rotary_dim=4
        ),
    ),
    "deepseek_latent": _model(
        MoEConfig(
            kind="latent",
            d_latent=16,
            top_k=2,
            n_dense_layers=1,
            router=RouterConfig("sigmoid", n_groups=2, top_k_groups=1, group_best=2),
        ),
        rope=RopeConfig(interleaved=True, scaling="llama3", factor=8.0, original_max_len=16),
    ),
}
"""Together they hold every value of every option that changes a number."""


def random_model(config: ModelConfig, seed: int = 0, bias: bool = True) -> Transformer:
    """A model none of whose tensors has a value that would hide a mistake, such as 0 or 1; without
    `bias` the selection bias is 0, as training without such a rule leaves it."""
    model = Transformer(config, Compute(torch.float32), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("router.bias_HE") and not bias:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            narrow = tensor.dim() == 1 or "norm" in name or "bias" in name
            tensor.add_(noise * (0.3 if narrow else tensor.shape[-1] ** -0.5))
    return model


def write_run(
    folder: Path, config: ModelConfig, tokenizer: str = "bytes", bias: bool | None = None
) -> Transformer:
    """Write a run folder with one checkpoint; return its model. `bias`: as for `random_model`; None:
    where no published family could say it anyway."""
    flat = config.moe.kind == "moe" and config.moe.balance.bias == "none"
    plain = flat and not config.moe.n_zero_experts
    model = random_model(config, bias=not plain if bias is None else bias)
    folder.mkdir(parents=True)
    whole = Config(
        recipe="small",
        model=config,
        data=DataConfig(tokenizer=tokenizer, seq_len=64, micro_batch_size=1),
    )
    info = {
        "config": whole.to_dict(),
        "commit": "0123abc",
        "parameters": {"total": 12345, "active": 678},
    }
    (folder / "run.json").write_text(json.dumps(info))
    record = {"step": 3, "tokens": 4096, "val_bits_per_byte": 2.5}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    optimizers = build_optimizers(model, OptimConfig())
    write_checkpoint(plan_save(folder, 3, model, optimizers, config, {}))
    return model


def export(run: Path, to: Path, dtype="float32", family="headway", **how) -> Exported:
    """Export a run, by default to a folder that says everything, exactly."""
    with open_trained(run) as source:
        return export_hf(source, to, dtype, family, **how)
