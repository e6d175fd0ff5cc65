"""Recipes that need one GPU or several."""

from dataclasses import replace

from headway.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig


def small() -> Config:
    """Return about 200 million parameters, a fifth of them active: one GPU, an hour or two."""
    return Config(
        recipe="small",
        model=ModelConfig(
            vocab_size=32_768,  # room for a tokenizer made by `headway tokenize --vocab-size 32768`
            n_layers=12,
            d_model=768,
            n_heads=12,
            n_kv_heads=4,
            d_ff=2048,
            moe=MoEConfig(
                kind="multi_head_latent",
                n_heads=6,
                n_experts=32,
                top_k=4,
                d_expert=192,
                d_shared=512,
                n_dense_layers=1,
            ),
        ),
        data=DataConfig(seq_len=1024, batch_size=64, micro_batch_size=32),
        optim=OptimConfig(name="muon", steps=10_000, lr=1e-3),
        run=RunConfig(recompute=True, checkpoint_every=1000, eval_tokens=1 << 21),
    )


def large() -> Config:
    """Return several billion parameters, 1/8 of the experts active: 8 GPUs with Head Parallel."""
    base = small()
    return replace(
        base,
        recipe="large",
        model=replace(
            base.model,
            n_layers=24,
            d_model=2048,
            n_heads=16,
            n_kv_heads=4,
            d_ff=8192,
            moe=replace(
                base.model.moe, n_heads=8, n_experts=64, top_k=8, d_expert=512, d_shared=1024
            ),
        ),
        data=replace(base.data, seq_len=4096, batch_size=256, micro_batch_size=8),
        optim=replace(base.optim, steps=50_000),
    )
