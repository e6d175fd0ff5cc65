"""Where all layers have windows, pages behind them are given back and nothing changes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import EngineConfig
from headway.data.tokenizer import ByteTokenizer
from headway.model.compute import Compute
from headway.model.paged import PAGE
from headway.model.transformer import Transformer
from headway.serve.blocks import BlockPool, page_keys
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from tests.serve.conftest import CONFIG


def windowed(*window: int) -> Transformer:
    """A model in float64 whose layers have these windows in turn."""
    config = replace(CONFIG, window=window)
    return Transformer(config, Compute(torch.float64), seed=5).double().eval()


WINDOWS = {(20, 9): 20, (33,): 33, (16, 17): 17}
MODELS = {window: windowed(*window) for window in WINDOWS}


def text(n: int, seed: int = 1) -> list[int]:
    return torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def held(engine: Engine) -> int:
    pool = engine.scheduler.pool
    return pool.n_pages - pool.n_free


@settings(max_examples=12, deadline=None)
@given(
    window=st.sampled_from(list(WINDOWS)),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    shared=st.sampled_from([0, 40]),
    chunk=st.sampled_from([9, 37, 128]),
    pages=st.sampled_from([12, 14, 60]),
)
def test_log_probabilities_are_those_of_the_whole_text(window, sizes, shared, chunk, pages):
    """Whatever was given back, found again or taken away, twice on one engine."""
    model = MODELS[window]
    config = EngineConfig(
        max_len=256, max_requests=3, max_batch_tokens=chunk, cache_tokens=pages * PAGE
    )
    engine = Engine(model, ByteTokenizer(), config)
    prefix = text(shared, seed=7)
    prompts = [[*prefix, *text(n, seed=i)] for i, n in enumerate(sizes)]
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, logprobs=0)
    for _ in range(2):
        for prompt, (reply,) in zip(prompts, engine.generate(prompts, params), strict=True):
            whole = torch.tensor([[*prompt, *reply.tokens]])
            with torch.no_grad():
                logits = model(whole).logits_BSV[0, len(prompt) - 1 : -1, :257]
            expected = torch.log_softmax(logits, -1)
            assert expected.argmax(-1).tolist() == reply.tokens
            scored = torch.tensor([t.logprob for t in reply.logprobs], dtype=torch.float64)
            error = scored - expected.gather(1, whole[0, len(prompt) :, None])[:, 0]
            assert error.abs().max() < 1e-10
    assert held(engine) == 0


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_long_text_holds_few_pages(window):
    engine = Engine(MODELS[window], ByteTokenizer(), EngineConfig(max_len=512, max_requests=2))
    engine.add(text(150), SamplingParams(max_tokens=200, n=2, ignore_eos=True))
    engine.step()
    most, widest = 0, WINDOWS[window]
    while engine.has_work:
        engine.step()
        most = max(most, held(engine))
    # the window may begin in a page and end in another, beside one that is being written
    assert most <= 2 * (-(-(widest - 1) // PAGE) + 1)
    assert held(engine) == 0


def test_layers_without_a_window_keep_all_pages():
    engine = Engine(windowed(16, 0), ByteTokenizer(), EngineConfig(max_len=256))
    engine.add(text(150), SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    assert held(engine) == 10
    routes = Engine(MODELS[33,], ByteTokenizer(), EngineConfig(max_len=256, return_routes=True))
    params = SamplingParams(max_tokens=20, return_routes=True, ignore_eos=True)
    assert routes.generate([text(150)], params)[0][0].routes.experts.shape[0] == 169


def test_a_prefix_is_found_by_what_its_next_token_sees():
    pool, keys = BlockPool(6), page_keys(list(range(6 * PAGE)))
    pages = []
    for key in keys:
        pages.append(pool.allocate())
        pool.seal(pages[-1], key)
    pool.release(pages[:2])  # given back first, so forgotten first
    pool.release(pages[2:])
    pool.allocate(), pool.allocate()
    assert pool.match(keys) == []
    assert pool.n_reusable(keys, reach=2) == 6 and pool.n_reusable(keys, reach=5) == 0
    assert pool.n_reusable(keys[:3], reach=2) == 0 and pool.n_reusable(keys[:4], reach=2) == 4


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
    pool = engine.scheduler.pool
    assert pool.match(page_keys(first)[:1]) == []
