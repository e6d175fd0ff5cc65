"""What modules say that they keep against bytes counted in the running model, on the default CPU
path; states against the optimiser's."""

from dataclasses import replace

import pytest
import torch

from headway.config import (
    BalanceConfig,
    Config,
    DataConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RopeConfig,
    RouterConfig,
    RunConfig,
)
from headway.kernels.cpp import cpp_kernels
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers
from headway.plan.cost import ModelCosts, model_costs, total
from headway.plan.layout import MeshLayout
from headway.plan.machine import machine_named
from headway.plan.memory import MemoryPart, states
from headway.plan.setting import Setting
from tests.kernels.cpp_paths import needs_native

SPARSE = MoEConfig(n_heads=2, n_experts=8, top_k=3, d_expert=20)
BASE = ModelConfig(
    vocab_size=64, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_head=16, d_ff=40, moe=SPARSE
)
MODELS = {
    "multi-head latent": BASE,
    "shared, latent norm, wider latent": replace(
        BASE, moe=replace(SPARSE, d_shared=24, latent_norm=True, d_latent=64, n_dense_layers=1)
    ),
    "whole token": replace(BASE, moe=replace(SPARSE, router=RouterConfig(reads="token"))),
    "sigmoid": replace(
        BASE, moe=replace(SPARSE, router=RouterConfig(gate="sigmoid", renormalize=True, scale=2.0))
    ),
    "noisy": replace(BASE, moe=replace(SPARSE, router=RouterConfig(noisy=True))),
    "flat": replace(
        BASE, moe=MoEConfig(kind="moe", n_experts=8, top_k=3, d_expert=20, activation="relu2")
    ),
    "latent": replace(
        BASE,
        moe=MoEConfig(
            kind="latent",
            n_experts=8,
            top_k=3,
            d_expert=20,
            d_latent=16,
            activation="gelu",
            router=RouterConfig(gate="softmax_topk", reads="token"),
        ),
    ),
    "slices": replace(BASE, moe=replace(SPARSE, projection="none")),
    "slices without norm": replace(BASE, moe=replace(SPARSE, projection="none", latent_norm=False)),
    "dense": replace(BASE, moe=MoEConfig(kind="dense")),
    "dense, gate, window": replace(
        BASE, moe=MoEConfig(kind="dense"), attn_gate=True, window=(5, 0), activation="gelu"
    ),
    "relu2, no QK-norm, tied": replace(
        BASE, moe=MoEConfig(kind="dense"), qk_norm="none", activation="relu2", tied=True
    ),
}
MODELS |= {
    "biases, QK-norm over all heads, clamped": replace(
        BASE, qkv_bias=True, o_bias=True, qk_norm="all", clip_qkv=1.0
    ),
    "a gate on the shared expert, every other layer": replace(
        BASE, moe=replace(SPARSE, d_shared=24, shared_gate=True, sparse_step=2)
    ),
    "experts of GPT-OSS": replace(
        BASE, moe=replace(SPARSE, activation="swiglu_clamped", expert_bias=True)
    ),
    "flat experts of GPT-OSS": replace(
        BASE,
        moe=replace(SPARSE, kind="moe", n_heads=1, activation="swiglu_clamped", expert_bias=True),
    ),
    "sinks": replace(BASE, sinks=True, window=(5, 0)),
    "latent attention": replace(
        BASE,
        mixer="mla",
        n_kv_heads=0,
        d_head=0,
        mla=MLAConfig(kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=10),
    ),
    "latent attention, queries too": replace(
        BASE,
        mixer="mla",
        n_kv_heads=0,
        d_head=0,
        window=(5, 0),
        mla=MLAConfig(
            q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=16
        ),
    ),
    "biased scores": replace(BASE, moe=replace(SPARSE, router=RouterConfig(logit_bias=True))),
    "groups of experts": replace(
        BASE, moe=replace(SPARSE, router=RouterConfig(gate="sigmoid", n_groups=4, top_k_groups=2))
    ),
    "some dims rotated, neighbours": replace(
        BASE, moe=MoEConfig(kind="dense"), rope=RopeConfig(rotary_dim=8, interleaved=True)
    ),
}
B, S = 3, 24


def costs_of(
    model: ModelConfig, b: int = 4, recompute: bool = False, doc: bool = False
) -> ModelCosts:
    data = DataConfig(seq_len=S, doc_mask=doc)
    return model_costs(Config(model=model, data=data, run=RunConfig(recompute=recompute)), B, b)


def saved_bytes(model: Transformer, doc: bool) -> int:
    """Bytes of all storages that autograd keeps, each once, without the parameters themselves."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    tokens = torch.randint(0, model.config.vocab_size, (B, S))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ctx = Context(torch.zeros(B, S, dtype=torch.int32) if doc else None)
        out = model(tokens, tokens, ctx)
    assert out.nats.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@needs_native
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_activation_bytes_match_saved_tensors(name, recompute):
    config = MODELS[name]
    measured = saved_bytes(Transformer(config, Compute(recompute=recompute), seed=0), doc=False)
    formula = total(costs_of(config, recompute=recompute).saved)
    assert formula == pytest.approx(measured, rel=0.02)


@pytest.mark.skipif(not cpp_kernels().bfloat16, reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize(
    "name", ["multi-head latent", "shared, latent norm, wider latent", "whole token", "flat"]
)
def test_activation_bytes_in_bfloat16(name):
    config = MODELS[name]
    measured = saved_bytes(Transformer(config, Compute(dtype=torch.bfloat16), seed=0), doc=False)
    assert total(costs_of(config, 2).saved) == pytest.approx(measured, rel=0.02)


@needs_native
def test_document_masks_are_counted():
    measured = saved_bytes(Transformer(BASE, seed=0), doc=True)
    assert total(costs_of(BASE, doc=True).saved) == pytest.approx(measured, rel=0.02)


def test_dense_masks_are_counted_where_a_gpu_takes_them():
    config = Config(model=replace(BASE, window=(5, 0)), data=DataConfig(seq_len=S))
    gpu, cpu = (Setting(config, machine_named(name)).costs(B) for name in ("h100", "cpu"))
    assert total(gpu.saved) - total(cpu.saved) == 2 * (S * S * 2 - 4 * B * S)  # of three layers
    documents = replace(config, data=replace(config.data, doc_mask=True))
    gpu = Setting(documents, machine_named("h100")).costs(B)
    assert total(gpu.saved) - total(cpu.saved) == 3 * B * S * S * 2 - 2 * 4 * B * S


def test_recompute_saves_what_the_experts_keep():
    full, lean = (total(costs_of(BASE, recompute=r).saved) for r in (False, True))
    pre = BASE.n_layers * B * S * SPARSE.n_heads * SPARSE.top_k * 2 * SPARSE.d_expert * 4
    assert full - lean > pre


@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(),
        OptimConfig(state_dtype="bfloat16"),
        OptimConfig(name="muon"),
        OptimConfig(name="muon", muon_experts=False),
    ],
)
@pytest.mark.parametrize(
    "name", ["multi-head latent", "dense, gate, window", "shared, latent norm, wider latent"]
)
def test_states_match_the_optimiser(name, optim):
    model = Transformer(MODELS[name], seed=0)
    optimizers = build_optimizers(model, optim)
    tokens = torch.randint(0, 64, (B, S))
    model(tokens, tokens).nats.backward()
    optimizers.set_lr(1.0)
    optimizers.step(1.0)
    counted = sum(t.numel() * t.element_size() for t in optimizers.tensors().values())
    items = {i.part: i.value for i in states(costs_of(MODELS[name]), MeshLayout(), optim)}
    weights = sum(4 * p.numel() for p in model.parameters())
    assert items[MemoryPart.WEIGHTS] == items[MemoryPart.GRADIENTS] == weights
    moments = sum(items.get(part, 0) for part in (MemoryPart.ADAMW, MemoryPart.MUON))
    assert moments == pytest.approx(counted, rel=0.01)


@needs_native
def test_balance_rule_does_not_change_memory_much():
    quantile = replace(BASE, moe=replace(SPARSE, balance=BalanceConfig(aux=0, bias="quantile")))
    measured = saved_bytes(Transformer(quantile, seed=0), doc=False)
    assert total(costs_of(quantile).saved) == pytest.approx(measured, rel=0.02)
