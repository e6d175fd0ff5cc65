"""Layers with windows give back the pages behind them, whatever others keep, and nothing changes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import EngineConfig
from headway.data.tokenizer import ByteTokenizer
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.paged import PAGE
from headway.model.transformer import Transformer
from headway.serve.blocks import BlockPool, n_reusable, page_keys
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from tests.kernels.cpp_paths import NATIVE_DTYPES
from tests.serve.conftest import CONFIG


def windowed(*window: int) -> Transformer:
    """A model in float64 whose layers have these windows in turn."""
    config = replace(CONFIG, window=window, n_layers=max(2, len(window)))
    return Transformer(config, Compute(torch.float64), seed=5).double().eval()


WINDOWS = [(20, 9), (33,), (16, 17), (0, 20), (9, 0, 40)]
MODELS = {window: windowed(*window) for window in WINDOWS}


def text(n: int, seed: int = 1) -> list[int]:
    return torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def nothing_is_lost(engine: Engine) -> None:
    """Every page is free, each once."""
    for pool in engine.scheduler.pools.values():
        assert sorted(pool._free) == list(range(pool.n_pages)) and not any(pool._holders)


@settings(max_examples=12, deadline=None)
@given(
    window=st.sampled_from(WINDOWS),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    shared=st.sampled_from([0, 40]),
    chunk=st.sampled_from([9, 37, 128]),
    pages=st.sampled_from([12, 14, 60]),
    n=st.sampled_from([1, 2]),
)
def test_log_probabilities_are_those_of_the_whole_text(window, sizes, shared, chunk, pages, n):
    """Whatever was given back, found again or taken away, twice on one engine."""
    model = MODELS[window]
    config = EngineConfig(
        max_len=256, max_requests=3, max_batch_tokens=chunk, cache_tokens=pages * PAGE
    )
    engine = Engine(model, ByteTokenizer(), config)
    prefix = text(shared, seed=7)
    prompts = [[*prefix, *text(n, seed=i)] for i, n in enumerate(sizes)]
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, logprobs=0, n=n)
    for _ in range(2):
        replies = engine.generate(prompts, params)
        for prompt, (reply, *others) in zip(prompts, replies, strict=True):
            assert [other.tokens for other in others] == [reply.tokens] * (n - 1)
            whole = torch.tensor([[*prompt, *reply.tokens]])
            with torch.no_grad():
                logits = model(whole).logits_BSV[0, len(prompt) - 1 : -1, :257]
            expected = torch.log_softmax(logits, -1)
            assert expected.argmax(-1).tolist() == reply.tokens
            scored = torch.tensor([t.logprob for t in reply.logprobs], dtype=torch.float64)
            error = scored - expected.gather(1, whole[0, len(prompt) :, None])[:, 0]
            assert error.abs().max() < 1e-10
    nothing_is_lost(engine)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_long_text_holds_few_pages(window):
    engine = Engine(MODELS[window], ByteTokenizer(), EngineConfig(max_len=512, max_requests=2))
    engine.add(text(150), SamplingParams(max_tokens=200, n=2, ignore_eos=True))
    engine.step()
    most = dict.fromkeys(window, 0)
    while engine.has_work:
        engine.step()
        for w, pool in engine.scheduler.pools.items():
            most[w] = max(most[w], pool.n_pages - pool.n_free)
    # a window may begin in a page and end in another, beside one that is being written; two choices
    # share the nine full pages of their prompt
    assert most == {w: 2 * (-(-(w - 1) // PAGE) + 1) if w else 2 * 22 - 9 for w in window}
    nothing_is_lost(engine)


def test_layers_without_a_window_keep_all_pages():
    engine = Engine(windowed(16, 0), ByteTokenizer(), EngineConfig(max_len=256))
    engine.add(text(150), SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    held = {w: pool.n_pages - pool.n_free for w, pool in engine.scheduler.pools.items()}
    assert held == {0: 10, 16: 2} and engine.scheduler.n_held == 12


def test_routes_are_kept_though_all_layers_have_windows():
    params = SamplingParams(max_tokens=20, temperature=0, return_routes=True, ignore_eos=True)
    config = EngineConfig(max_len=256, max_batch_tokens=40, max_requests=8, return_routes=True)
    engine = Engine(MODELS[33,], ByteTokenizer(), config)
    engine.generate([text(100)], params)
    reply = engine.generate([text(150)], params)[0][0]
    assert engine.counters.cached_tokens == 96
    with torch.no_grad():
        whole = torch.tensor([[*text(150), *reply.tokens[:-1]]])
        output = MODELS[33,](whole, ctx=Context(report=frozenset({"routes"})))
    expected = torch.stack([r.index_THK.flatten(1) for r in output.routes], 1)
    assert (reply.routes.experts == expected.numpy()).all()


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_the_cache_has_the_bytes_of_the_formula(dtype):
    config = replace(CONFIG, window=(0, 40, 40), n_layers=3, d_model=64)  # heads of width 16
    model = Transformer(config, Compute(dtype), seed=0).eval()
    sizes = EngineConfig(max_len=256, max_requests=4, max_batch_tokens=64, cache_tokens=2000)
    engine = Engine(model, ByteTokenizer(), sizes)
    position = 2 * 2 * 16 * dtype.itemsize  # keys and values of two heads, in one layer
    expected = 16 * (125 * position + 2 * (4 * 5 + 4) * 2 * position)
    assert sum(state.bytes for state in engine.runner.states) == expected
    assert engine.cache_tokens == 2000 and engine.scheduler.n_pages == 125 + 48


def test_a_prefix_is_found_by_what_its_next_token_sees():
    keys = page_keys(list(range(6 * PAGE)))

    def pool(window: int, forgotten: list[int]) -> BlockPool:
        """Pages of the six keys, some forgotten."""
        pool = BlockPool(6, window)
        for key in keys:
            pool.seal(pool.allocate(), key)
        pool.forget(forgotten)
        return pool

    near, far, every = pool(33, [0, 1]), pool(81, [0, 1]), pool(0, [])  # reach 2, 5, all
    assert n_reusable([near], keys) == 6 and n_reusable([far], keys) == 0
    assert n_reusable([near], keys[:3]) == 0 and n_reusable([near], keys[:4]) == 4
    assert n_reusable([near, every], keys) == 6 and n_reusable([near, far], keys) == 0
    # of all layers the least: the pages of all tokens, and those that the next one sees
    assert n_reusable([near, pool(0, [5])], keys) == 5
    assert n_reusable([pool(33, [4]), every], keys) == 4
    assert n_reusable([pool(33, [3]), pool(0, [4])], keys) == 3
    assert near.match(keys).pages[:4] == [0] * 4 and near.match(keys).n_behind == 4


def test_a_conversation_goes_on_though_its_head_is_forgotten():
    sizes = EngineConfig(max_len=256, cache_tokens=12 * PAGE)
    engine = Engine(MODELS[16, 17], ByteTokenizer(), sizes)
    first = text(100)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    reply = engine.generate([first], params)[0][0].tokens
    # ten pages: the four that are empty, and those that were given back
    engine.generate([text(150, seed=9)], SamplingParams(max_tokens=1))
    request = engine.add([*first, *reply, 65], params)
    engine.step()
    assert request.n_cached == (100 + 19) // PAGE * PAGE
    for pool in engine.scheduler.pools.values():
        assert page_keys(first)[0] not in pool
