"""Recipes that train in minutes on two cores of a CPU."""

from dataclasses import replace

from headway.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RouterConfig,
    RunConfig,
    latent_acc,
)


def demo() -> Config:
    """Return the config of `make demo`: a byte-level Multi-Head LatentMoE on Python's standard
    library, under 5 minutes on 2 cores."""
    return Config(
        recipe="demo",
        model=ModelConfig(
            n_layers=4, d_model=192, n_heads=4, moe=_heads(4, n_experts=32, top_k=8, d_expert=64)
        ),
        data=DataConfig(seq_len=256, batch_size=8),
        optim=OptimConfig(name="muon", steps=400, lr=3e-3, warmup=0.05),
        # on a machine slower than expected it stops in time, and says so
        run=RunConfig(eval_every=80, eval_tokens=16_384, log_every=10, max_seconds=240),
    )


def dense() -> Config:
    """Return the baseline of `moe`, `latent` and `multi_head_latent`: a dense network with the same
    FLOPs per token."""
    return Config(
        recipe="dense",
        model=ModelConfig(
            n_layers=4, d_model=128, n_heads=4, d_ff=512, moe=MoEConfig(kind="dense")
        ),
        # a large batch: Newton–Schulz costs the same whatever the number of tokens
        data=DataConfig(seq_len=128, batch_size=32),
        optim=OptimConfig(name="muon", steps=500, lr=3e-3, beta2=0.99, warmup=0.05, decay=0.4),
        run=RunConfig(eval_tokens=65_536),
    )


def moe() -> Config:
    """Return a flat mixture: eight of 32 narrow experts have the FLOPs of the dense network."""
    return _sparse("moe", MoEConfig(kind="moe", n_experts=32, top_k=8, d_expert=64))


def latent() -> Config:
    """Return LatentMoE-acc at α = 2: twice as many experts, half as wide, with the same FLOPs."""
    n_experts, top_k = latent_acc(32, 8, alpha=2, d_expert=64, d_model=128, activation="swiglu")
    layer = MoEConfig(
        kind="latent",
        n_experts=n_experts,
        top_k=top_k,
        d_expert=64,
        d_latent=64,
        router=RouterConfig(reads="token"),
    )
    return _sparse("latent", layer)


def multi_head_latent() -> Config:
    """Return a Multi-Head LatentMoE: two heads of width 64 whose routers read the whole token;
    narrower experts (F 50, not 64) pay for projections and routers."""
    return _sparse("multi_head_latent", _heads(2, n_experts=40, top_k=8, d_expert=50))


def _heads(n_heads: int, *, n_experts: int, top_k: int, d_expert: int) -> MoEConfig:
    """Return a Multi-Head LatentMoE layer whose routers read the whole token."""
    return MoEConfig(
        kind="multi_head_latent",
        n_heads=n_heads,
        n_experts=n_experts,
        top_k=top_k,
        d_expert=d_expert,
        router=RouterConfig(reads="token"),
    )


def _sparse(name: str, layer: MoEConfig) -> Config:
    """Return `dense` with another feed-forward layer."""
    base = dense()
    return replace(base, recipe=name, model=replace(base.model, moe=layer))


def shakespeare() -> Config:
    """Return what bench/shakespeare.py times, for a small text given with `--data`: nanoGPT's CPU
    size (4 layers of width 128), two heads of small experts, Muon."""
    return Config(
        recipe="shakespeare",
        model=ModelConfig(
            n_layers=4, d_model=128, n_heads=4, moe=_heads(2, n_experts=8, top_k=2, d_expert=64)
        ),
        data=DataConfig(seq_len=64, batch_size=12, val_fraction=0.1),
        optim=OptimConfig(name="muon", steps=1000, lr=4e-3, beta2=0.99, warmup=0.02, decay=0.5),
        run=RunConfig(sample_prompt="\n"),
    )


def cpu_step() -> Config:
    """Return the shape of bench/cpu_step.py: a flat mixture like Hugging Face's OLMoE, chosen for
    timing and not for quality."""
    return Config(
        recipe="cpu_step",
        model=ModelConfig(
            vocab_size=512,
            n_layers=6,
            d_model=384,
            n_heads=6,
            moe=MoEConfig(kind="moe", n_experts=32, top_k=4, d_expert=192),
        ),
        data=DataConfig(seq_len=256, batch_size=8),
        optim=OptimConfig(steps=20),
    )
