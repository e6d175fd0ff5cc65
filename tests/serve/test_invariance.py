"""The bits of a reply: the same alone and in company, in any chunks, from a cold and a warm cache,
after preemption, in both dtypes of the kernels."""

from dataclasses import replace
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import EngineConfig, MLAConfig, MoEConfig, RopeConfig, RouterConfig
from headway.data.tokenizer import ByteTokenizer
from headway.model.compute import Compute
from headway.model.packing import pack_
from headway.model.paged import PAGE
from headway.model.transformer import Transformer
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from tests.kernels.cpp_paths import NATIVE_DTYPES, needs_native, threads
from tests.serve.conftest import CONFIG

MODELS = {
    "multi_head": replace(CONFIG, window=(0, 20)),
    "deepseek_v3": replace(
        CONFIG,
        n_kv_heads=0,
        mixer="mla",
        mla=MLAConfig(
            q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        rope=RopeConfig(interleaved=True),
        moe=MoEConfig(
            kind="moe",
            n_experts=8,
            top_k=3,
            d_expert=16,
            d_shared=12,
            n_dense_layers=1,
            router=RouterConfig(
                gate="sigmoid",
                renormalize=True,
                scale=2.5,
                n_groups=4,
                top_k_groups=2,
                group_best=2,
            ),
        ),
    ),
}


@cache
def packed(name: str, dtype: torch.dtype) -> Transformer:
    model = Transformer(MODELS[name], Compute(dtype), seed=5).eval()
    pack_(model, dtype)
    return model


def engine(name: str, dtype: torch.dtype, **options) -> Engine:
    sizes = {"max_len": 160, "max_requests": 4, **options}
    return Engine(packed(name, dtype), ByteTokenizer(), EngineConfig(**sizes))


def prompts(sizes: list[int], shared: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(256, (shared,), generator=generator).tolist()
    return [[*prefix, *torch.randint(256, (n,), generator=generator).tolist()] for n in sizes]


@needs_native
@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    dtype=st.sampled_from(NATIVE_DTYPES),
    arrivals=st.lists(
        st.tuples(st.integers(0, 8), st.integers(1, 70), st.integers(1, 25)), min_size=2, max_size=6
    ),
    chunk=st.sampled_from([5, 9, 24, 128]),
    pages=st.sampled_from([9, 12, 60]),
    shared=st.sampled_from([0, 40]),
)
def test_nothing_changes_a_bit(name, dtype, arrivals, chunk, pages, shared):
    inference = engine(name, dtype, max_batch_tokens=chunk, cache_tokens=pages * PAGE)
    assert inference.runner.batch_invariant
    texts = prompts([n for _, n, _ in arrivals], shared)
    asked = [
        SamplingParams(max_tokens=n, seed=i, temperature=1.5, logprobs=3, ignore_eos=True)
        for i, (_, _, n) in enumerate(arrivals)
    ]
    alone = [
        engine(name, dtype).generate([text], params)[0][0].logprobs
        for text, params in zip(texts, asked, strict=True)
    ]
    for n_threads in (1, 2):  # the second time from a warm cache
        due = sorted(range(len(arrivals)), key=lambda i: arrivals[i][0])
        replies: dict[int, list] = {i: [] for i in due}
        order, step = {}, 0
        with threads(n_threads):
            while due or inference.has_work:
                while due and arrivals[due[0]][0] <= step:
                    i = due.pop(0)
                    order[inference.add(texts[i], asked[i])] = i
                for update in inference.step() if inference.has_work else ():
                    replies[order[update.request]] += update.logprobs
                step += 1
        assert replies == dict(enumerate(alone))  # equal floats: equal bits
    assert inference.scheduler.n_held == 0


@needs_native
def test_a_preempted_reply_keeps_its_bits():
    for name in MODELS:
        for dtype in NATIVE_DTYPES:
            roomy, tight = engine(name, dtype), engine(name, dtype, cache_tokens=9 * PAGE)
            params = SamplingParams(
                max_tokens=40, seed=3, temperature=1.5, logprobs=2, ignore_eos=True
            )
            texts = prompts([30, 31, 32, 33], shared=16)
            assert tight.generate(texts, params) == roomy.generate(texts, params)
            assert tight.scheduler.n_preemptions and not roomy.scheduler.n_preemptions
