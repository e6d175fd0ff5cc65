"""A whole training step on one GPU: Headway beside Transformers' OLMoE of the same size.

16 layers of width 1,024, 64 experts of 256 per layer, top-8, a vocabulary of 50,304: 0.98 billion
parameters, 0.27 active per token. Sequences of 2,048, 16,384 tokens a step. A step is forward with
the balance loss, backward, clipping by the global norm and fused AdamW. MFU counts six operations
per active parameter and token and causal attention, over the matmul peak measured in the same
session.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench import gpu_measure
from bench.common import parameters
from headway.config import ModelConfig, MoEConfig, OptimConfig
from headway.model.balance import balance_loss
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers, clip_factor
from headway.parallel.reduce import total_norm

if TYPE_CHECKING:
    from bench.gpu_stages import Record

FLAT = ModelConfig(
    vocab_size=50304,
    d_model=1024,
    n_layers=16,
    n_heads=16,
    moe=MoEConfig(kind="moe", n_experts=64, top_k=8, d_expert=256),
)
TOY = ModelConfig(
    vocab_size=64,
    d_model=32,
    n_layers=1,
    n_heads=2,
    moe=MoEConfig(kind="moe", n_experts=4, top_k=2, d_expert=16),
)
Build = Callable[[], Callable[[], object]]


def rivals(record: "Record") -> dict[str, tuple[ModelConfig, Build]]:
    """Name → the shape, and what builds a step."""
    from bench.gpu_step_rival import rival_step

    flat, sizes = (TOY, (2, 16)) if record.dry else (FLAT, (8, 2048))
    device = record.device
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(
        flat.vocab_size, (sizes[0], sizes[1] + 1), generator=generator, device=device
    )
    heads = replace(flat.moe, kind="multi_head_latent", n_heads=2 if record.dry else 8)
    latent = replace(flat, moe=heads)
    implementation = "eager" if record.dry else "grouped_mm"

    def ours(model: ModelConfig) -> Build:
        return lambda: headway_step(model, tokens, device)

    def theirs(weights: str, compiled: bool = False) -> Build:
        return lambda: rival_step(
            flat,
            tokens[:, :-1],
            device,
            "float32" if record.dry else weights,  # type: ignore[arg-type]
            implementation,
            balance=True,
            compiled=compiled,
        )

    found = {
        "headway, 8 heads of 128": (latent, ours(latent)),
        "headway, flat": (flat, ours(flat)),
        "OLMoE grouped_mm, float32 masters": (flat, theirs("masters")),
        "OLMoE grouped_mm, all bfloat16": (flat, theirs("bfloat16")),
    }
    if not record.dry:
        found["OLMoE grouped_mm, all bfloat16, compiled"] = (flat, theirs("bfloat16", True))
    return found


def headway_step(
    model: ModelConfig, tokens_BS: Tensor, device: torch.device
) -> Callable[[], object]:
    """Float32 weights, gradients and moments; matmuls in bfloat16."""
    torch.manual_seed(0)
    with torch.device("meta"):
        made = Transformer(model, Compute(dtype=torch.bfloat16, recompute=True))
    made.to_empty(device=device)
    draw(made)
    optimizers = build_optimizers(made, OptimConfig(lr=3e-4), newton_schulz_dtype=torch.bfloat16)
    optimizers.set_lr(1.0)
    inputs, targets = tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous()

    def step() -> object:
        out = made(inputs, targets)
        loss = out.nats / targets.numel() + balance_loss(out.stats, model.moe.balance)
        loss.backward()
        norm = total_norm(p.grad for p in made.parameters() if p.grad is not None)
        optimizers.step(clip_factor(float(norm), 1.0))
        optimizers.zero_grad()
        return loss.detach()

    return step


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Weights made on the device: N(0, 1/fan-in), norms 1, buffers 0."""
    for name, p in model.named_parameters():
        if "norm" in name:
            p.fill_(1.0)
        else:
            p.normal_(0.0, 0.02 if "embed" in name else p.shape[-1] ** -0.5)
    for buffer in model.buffers():
        buffer.zero_()


def row(model: ModelConfig, build: Build, record: "Record", peak_tflops: float) -> dict:
    """Tokens/s, MFU and peak memory of one step."""
    on_gpu = record.device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = build()
    found = gpu_measure.times({"step": step}, record.repeats, warmup=3)["step"]
    batch, length = (2, 16) if record.dry else (8, 2048)
    flop = 6 * parameters(model)[1] + 6 * model.n_layers * model.d_model * length
    ms = statistics.median(found)
    total, active = parameters(model)
    return {
        "part": "step",
        "step_ms": ms,
        "raw_ms": found,
        "tokens_per_s": 1e3 * batch * length / ms,
        "mfu": flop * batch * length / ms / 1e9 / peak_tflops,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "parameters": total,
        "active": active,
        "loss": float(step()),  # type: ignore[arg-type]
    }
