"""Options of published families over pages: packed models give the same bits whole, in parts and
beside others."""

from dataclasses import replace

import pytest
import torch

from headway.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from headway.kernels.packed import batch_invariant
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.packing import pack_
from headway.model.paged import PagedCache, Segment
from headway.model.transformer import Transformer
from tests.compare import assert_close

CPU = torch.device("cpu")
MOE = MoEConfig(kind="moe", n_experts=8, top_k=3, d_expert=20)
BASE = ModelConfig(vocab_size=61, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, moe=MOE)
YARN = RopeConfig(scaling="yarn", factor=4.0, original_max_len=16)
GROUPS = RouterConfig(
    gate="sigmoid", renormalize=True, scale=2.5, n_groups=4, top_k_groups=2, group_best=2
)
MODELS = {
    "olmoe": replace(BASE, n_kv_heads=0, qk_norm="all", clip_qkv=0.7),
    "qwen2_moe": replace(
        BASE, qk_norm="none", qkv_bias=True, moe=replace(MOE, d_shared=24, shared_gate=True)
    ),
    "glm4_moe": replace(
        BASE,
        rope=RopeConfig(rotary_dim=4),
        qkv_bias=True,
        moe=replace(MOE, d_shared=12, n_dense_layers=1, router=GROUPS),
    ),
    "gpt_oss": replace(
        BASE,
        qk_norm="none",
        qkv_bias=True,
        o_bias=True,
        sinks=True,
        window=(5, 0),
        rope=replace(YARN, truncate=False),
        moe=replace(
            MOE, activation="swiglu_clamped", expert_bias=True, router=RouterConfig(logit_bias=True)
        ),
    ),
    "deepseek_v3": replace(
        BASE,
        n_kv_heads=0,
        mixer="mla",
        mla=MLAConfig(
            q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        rope=replace(YARN, interleaved=True, mscale=1.0, mscale_all_dim=1.0),
        moe=replace(MOE, d_shared=12, n_dense_layers=1, router=GROUPS),
    ),
}


def build(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    model = Transformer(config, Compute(dtype), seed=3).to(dtype).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 or ".b_" in name or "bias" in name:  # norms and biases
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor += 0.2 * drawn.to(tensor.dtype)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_over_pages(name):
    exact, model = build(MODELS[name], torch.float64), build(MODELS[name], torch.float32)
    pack_(model, torch.float32)
    texts = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))
    pages = [[7, 2, 5], [1, 6, 3]]
    states = [block.mixer.init_pages(8, torch.float32, CPU) for block in model.blocks()]

    def run(*parts: tuple[int, int, int]) -> list[torch.Tensor]:
        """Logits of (sequence, first position, tokens)."""
        segments = [Segment(start, n, dict.fromkeys((0, 5), pages[i])) for i, start, n in parts]
        tokens = torch.cat([texts[i, start : start + n] for i, start, n in parts])
        out = model(tokens[None], ctx=Context(cache=PagedCache(states, segments)))
        return list(out.logits_BSV[0].split([n for _, _, n in parts]))

    whole = run((0, 0, 40))[0]
    assert_close(whole, exact(texts[:1]).logits_BSV[0], 1e-5)
    parts = [run((0, 0, 17))[0], run((1, 0, 3), (0, 17, 1))[1]]
    parts += [run((0, 18, 20), (1, 3, 1))[0], run((1, 4, 30), (0, 38, 2))[1]]
    promised = all(state.batch_invariant for state in states)
    assert promised == batch_invariant(CPU, torch.float32)
    if promised:
        assert torch.equal(torch.cat(parts), whole)
    else:
        assert_close(torch.cat(parts), whole, 1e-5)
