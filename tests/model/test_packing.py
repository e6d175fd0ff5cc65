"""A packed model: the same numbers as before, and the same bits for a token in any company."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.costs import Workload
from headway.model.packing import pack_
from headway.model.paged import PagedCache, Segment
from headway.model.transformer import Transformer
from tests.compare import assert_close
from tests.kernels.cpp_paths import NATIVE_DTYPES, needs_native, threads

SPARSE = {
    "moe": MoEConfig(kind="moe", n_experts=5, top_k=2, d_expert=12, d_shared=10),
    "latent": MoEConfig(kind="latent", n_experts=5, top_k=2, d_expert=12, d_latent=20),
    "multi_head": MoEConfig(
        kind="multi_head_latent", n_heads=2, n_experts=5, top_k=2, d_expert=12, n_dense_layers=1
    ),
    "sub_tokens": MoEConfig(
        kind="multi_head_latent",
        n_heads=2,
        n_experts=5,
        top_k=2,
        d_expert=12,
        router=RouterConfig(reads="sub_token", gate="sigmoid"),
    ),
    "grouped": MoEConfig(
        kind="moe",
        n_experts=6,
        top_k=2,
        d_expert=12,
        expert_bias=True,
        router=RouterConfig(logit_bias=True, n_groups=3, top_k_groups=2),
    ),
    "dense": MoEConfig(kind="dense"),
}


def config_of(kind: str, **changes) -> ModelConfig:
    sizes = {
        "vocab_size": 70,
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 40,
    }
    return ModelConfig(**{**sizes, "moe": SPARSE[kind], **changes})


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config, Compute(dtype), seed=3).eval().requires_grad_(False)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if "bias" in name or "b_in" in name or "b_out" in name:  # which are 0 at first
            x.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("kind", SPARSE)
def test_logits_and_losses_are_those_of_the_model(kind, dtype):
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    plain = config_of(kind, tied=kind == "moe", logit_softcap=5.0 if kind == "latent" else 0.0)
    tokens = torch.arange(40).view(2, 20) % 70
    targets = tokens.roll(-1, 1).masked_fill(tokens == 7, -1)
    for config in (plain, config_of(kind, attn_gate=True, qkv_bias=True, o_bias=True)):
        model, packed = model_of(config, dtype), model_of(config, dtype)
        pack_(packed, dtype)
        want = model(tokens, ctx=Context(report=frozenset({"routes"})))
        routes = tuple(route.index_THK for route in want.routes)
        replay = Context(replay=routes)  # rounding may decide between two experts
        got = packed(tokens, ctx=replay).logits_BSV
        assert got.dtype == torch.float32
        assert_close(got, want.logits_BSV, bound)
        nats = model(tokens, targets, replay).nats
        assert_close(packed(tokens, targets, replay).nats, nats, bound)
        scored = packed(tokens, targets, Context(replay=routes, log_probs=True))
        assert_close(scored.log_probs_BS.sum(), -nats, bound)
        if dtype == torch.float32:
            assert torch.equal(packed(tokens).logits_BSV, got)


def test_costs_are_counted_from_the_shapes():
    model, work = model_of(config_of("multi_head", qkv_bias=True)), Workload(seq_len=8)
    before = [cost.parameters for cost in model.costs(work)]
    pack_(model, torch.float32)
    assert [cost.parameters for cost in model.costs(work)] == before


def test_packing_twice_is_packing_once():
    model = model_of(config_of("moe", tied=True))
    tokens = torch.arange(9).view(1, 9)
    pack_(model, torch.float32)
    with torch.no_grad():
        want = model(tokens).logits_BSV
        pack_(model, torch.float32)
        assert torch.equal(model(tokens).logits_BSV, want)


BATCHED = {
    **{kind: config_of(kind) for kind in SPARSE},
    "gated": config_of("multi_head", attn_gate=True, qkv_bias=True, window=(0, 9)),
    "latent_attention": config_of(
        "grouped",
        n_kv_heads=0,
        mixer="mla",
        window=(0, 9),
        mla=MLAConfig(
            q_lora_rank=20, kv_lora_rank=15, qk_nope_head_dim=7, qk_rope_head_dim=4, v_head_dim=9
        ),
        rope=RopeConfig(interleaved=True),
    ),
    "capped": config_of("moe", tied=True, logit_softcap=9.0, qk_norm="all", clip_qkv=2.0),
}


@needs_native
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(BATCHED)),
    st.sampled_from(NATIVE_DTYPES),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(0, 10_000),
)
@torch.no_grad()
def test_logits_are_the_same_bits_in_any_chunks_and_company(kind, dtype, lengths, seed):
    """Whole texts alone, against texts in random parts beside others on 1 or 2 threads."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    model = model_of(BATCHED[kind], dtype)
    pack_(model, dtype)
    texts = [torch.randint(70, (n,), generator=g) for n in lengths]
    pages = torch.randperm(3 * len(texts), generator=g).view(-1, 3).tolist()

    def states():
        cpu = torch.device("cpu")
        return [block.mixer.init_pages(3 * len(texts), dtype, cpu) for block in model.blocks()]

    def run(cache, *chunks):
        segments = [Segment(a, b - a, dict.fromkeys((0, 9), pages[r])) for r, a, b in chunks]
        tokens = torch.cat([texts[r][a:b] for r, a, b in chunks])
        logits = model(tokens[None], ctx=Context(cache=PagedCache(cache, segments))).logits_BSV[0]
        return logits.split([b - a for _, a, b in chunks])

    whole = [run(states(), (r, 0, len(text)))[0] for r, text in enumerate(texts)]
    cache, done = states(), [0] * len(texts)
    while waiting := [r for r, text in enumerate(texts) if done[r] < len(text)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        chunks = [(r, done[r], draw.randint(done[r] + 1, len(texts[r]))) for r in chosen]
        with threads(draw.choice([1, 2])):
            parts = run(cache, *chunks)
        for (r, a, b), part in zip(chunks, parts, strict=True):
            assert torch.equal(part, whole[r][a:b])
            done[r] = b
