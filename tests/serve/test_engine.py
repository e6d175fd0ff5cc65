"""Requests beside each other give what each gives by itself, whatever is cached, chunked or taken
back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.config import EngineConfig, UsageError
from headway.data.tokenizer import ByteTokenizer
from headway.model.context import Context
from headway.model.paged import PAGE
from headway.serve.blocks import page_keys
from headway.serve.params import SamplingParams
from headway.serve.routes import joined_routes
from headway.serve.scheduler import MAX_CHUNK_BESIDE

EOS = ByteTokenizer.eos


@torch.no_grad()
def greedy(model, prompt: list[int], n: int) -> list[int]:
    """The most likely continuation, by passes over the whole text; an end of text ends it."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + n and tokens[len(prompt) :][-1:] != [EOS]:
        logits = model(torch.tensor([tokens])).logits_BSV[0, -1, :257]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def prompts(sizes: list[int], shared: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(256, (shared,), generator=generator).tolist()
    return [[*prefix, *torch.randint(256, (n,), generator=generator).tolist()] for n in sizes]


GREEDY = SamplingParams(max_tokens=12, temperature=0)


def test_many_requests_equal_each_by_itself(model, engine):
    texts = prompts([1, 15, 16, 17, 40, 3, 33, 64, 2, 90])
    expected = [greedy(model, text, 12) for text in texts]
    assert [c[0].tokens for c in engine().generate(texts, GREEDY)] == expected


def test_little_memory_takes_pages_back(model, engine):
    texts = prompts([30, 31, 32, 33, 34], shared=16)
    roomy, tight = engine(), engine(cache_tokens=8 * PAGE)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    expected = roomy.generate(texts, params)
    assert tight.generate(texts, params) == expected
    assert roomy.scheduler.n_preemptions == 0 and tight.scheduler.n_preemptions > 0
    assert tight.scheduler.n_held == 0


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=7
    ),
    chunk=st.sampled_from([5, 9, 17, 64]),
    pages=st.sampled_from([6, 9, 40]),
    shared=st.sampled_from([0, 20, 40]),
)
def test_arrival_chunks_and_cache_change_nothing(model, engine, arrivals, chunk, pages, shared):
    """Requests arrive at steps, with prompts of some length and a common prefix."""
    inference = engine(max_requests=4, max_batch_tokens=chunk, cache_tokens=pages * PAGE)
    texts = prompts([n for _, n, _ in arrivals], shared)
    due = sorted(range(len(arrivals)), key=lambda i: arrivals[i][0])
    tokens: dict = {}
    order, step = {}, 0
    while due or inference.has_work:
        while due and arrivals[due[0]][0] <= step:
            i = due.pop(0)
            params = SamplingParams(max_tokens=arrivals[i][2], seed=i, temperature=1.5)
            if len(texts[i]) + params.max_tokens <= pages * PAGE:
                order[inference.add(texts[i], params)] = i
        for update in inference.step() if inference.has_work else ():
            tokens.setdefault(order[update.request], []).extend(update.tokens)
        step += 1
    for i, sampled in tokens.items():
        params = SamplingParams(max_tokens=arrivals[i][2], seed=i, temperature=1.5)
        assert engine().generate([texts[i]], params)[0][0].tokens == sampled
    assert len(tokens) == len(order)
    assert inference.scheduler.n_held == 0


def test_a_prompt_that_waits_is_hashed_once(engine, monkeypatch):
    hashed = []

    def count(tokens, salt, known):
        keys = page_keys(tokens, salt, known)
        hashed.append(len(keys) - len(known))
        return keys

    monkeypatch.setattr("headway.serve.request.page_keys", count)
    inference = engine(cache_tokens=8 * PAGE)
    inference.add([1] * 40, SamplingParams(max_tokens=40, ignore_eos=True))
    inference.step()
    last = inference.add([2] * 100, SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(20):
        inference.step()
    assert last.n_cached == -1  # it waits
    while inference.has_work:
        inference.step()
    assert inference.scheduler.n_preemptions == 0
    assert sum(hashed) == (40 + 39) // PAGE + (100 + 19) // PAGE


def test_a_long_prompt_never_stalls_a_stream(engine):
    inference = engine(max_len=1024)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    stream = inference.add([1, 2, 3], params)
    inference.step()
    prompt = inference.add(prompts([600])[0], params)
    for step in range(600 // MAX_CHUNK_BESIDE + 1):
        updates = inference.step()
        assert stream in {update.request for update in updates}
        chunk = inference.sequences[1].n_computed - step * MAX_CHUNK_BESIDE
        assert chunk == min(MAX_CHUNK_BESIDE, 600 - step * MAX_CHUNK_BESIDE)
    assert prompt in {update.request for update in updates}


def test_log_probabilities_are_those_of_the_whole_text(model, engine):
    text = prompts([37])[0]
    params = SamplingParams(max_tokens=9, seed=3, logprobs=4, prompt_logprobs=2, ignore_eos=True)
    inference = engine(max_batch_tokens=11)
    for n_cached in (0, 0):  # a prompt that is scored is computed, though its prefix is cached
        request = inference.add(text, params)
        drawn = [u for _ in range(99) if inference.has_work for u in inference.step()]
        assert request.n_cached == n_cached
        tokens = [*text, *(u.tokens[0] for u in drawn)]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits_BSV[0, :, :257]
        expected = torch.log_softmax(logits, -1)
        scored = [*request.prompt_logprobs[1:], *(u.logprobs[0] for u in drawn)]
        assert request.prompt_logprobs[0] is None
        for i, score in enumerate(scored):
            assert score.token == tokens[i + 1]
            assert score.logprob == pytest.approx(float(expected[i, score.token]), abs=1e-10)
            best = expected[i].topk(4 if i >= len(text) - 1 else 2)
            assert [t for t, _ in score.top] == best.indices.tolist()


def test_the_end_of_a_prompt_is_scored_from_the_cache(engine):
    text = prompts([60])[0]
    whole, part = SamplingParams(max_tokens=0, prompt_logprobs=1), 49
    params = SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=part)
    inference = engine(max_batch_tokens=9)
    expected: list = []
    for asked, n_cached in ((whole, 0), (params, 48), (whole, 0)):
        request = inference.add(text, asked)
        while inference.has_work:
            inference.step()
        scores = [s and s.logprob for s in request.prompt_logprobs]
        expected = expected or scores
        assert request.n_cached == n_cached
        start = asked.prompt_logprobs_start
        assert scores[:start] == [None] * start
        assert scores[max(start, 1) :] == pytest.approx(expected[max(start, 1) :], abs=1e-12)


def test_the_time_of_a_step_holds_that_of_its_pass_and_of_its_draws(engine):
    inference = engine()
    inference.add(prompts([5])[0], GREEDY)
    inference.step()
    c = inference.counters
    assert c.steps == 1 and min(c.forward_seconds, c.sampling_seconds) > 0
    assert c.forward_seconds + c.sampling_seconds < c.step_seconds


def test_a_prefix_is_computed_once(engine):
    first, second = prompts([5, 9], shared=50)
    inference = engine()
    alone = [engine().generate([text], GREEDY)[0] for text in (first, second)]
    assert inference.generate([first], GREEDY)[0] == alone[0]
    request = inference.add(second, GREEDY)
    inference.step()
    assert request.n_cached == 48
    inference.abort(request.id)
    assert inference.generate([second], GREEDY)[0] == alone[1]
    salted = inference.add(second, GREEDY, salt="other")
    inference.step()
    assert salted.n_cached == 0
    assert inference.counters.cached_tokens == 48 + 48


def test_a_reply_can_be_continued_from_the_cache(engine):
    inference, text = engine(), prompts([20])[0]
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    reply = inference.generate([text], params)[0][0].tokens
    request = inference.add([*text, *reply, 65], params)
    inference.step()
    assert request.n_cached == (20 + 29) // PAGE * PAGE  # the last token of a reply is not computed


def test_choices_share_the_prompt(engine):
    text = prompts([40])[0]
    params = SamplingParams(max_tokens=10, n=5, seed=8, ignore_eos=True)
    inference = engine()
    request = inference.add(text, params)
    inference.step()
    assert inference.scheduler.n_held == 2 + 5
    inference.abort(request.id)
    choices = inference.generate([text], params)[0]
    assert len({tuple(c.tokens) for c in choices}) == 5
    # what later choices find of the prompt was not in the cache when the request came
    narrow = engine(max_requests=2)
    request = narrow.add(text, params)
    while narrow.has_work:
        narrow.step()
    assert request.n_cached == 0 and narrow.counters.cached_tokens == 0
    # the same where only two sequences run at once, and where pages run out
    for options in ({"max_requests": 2}, {"cache_tokens": 5 * PAGE}):
        assert engine(**options).generate([text], params)[0] == choices


def test_without_a_seed_each_request_differs(engine):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    a, b = engine().generate(prompts([9]) * 2, params)
    assert a[0].tokens != b[0].tokens


def test_stops(model, engine):
    text = prompts([12])[0]
    base = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    reply = engine().generate([text], base)[0][0]
    assert reply.finish_reason == "length" and len(reply.tokens) == 20

    def run(**options):
        params = SamplingParams(
            **{"max_tokens": 20, "temperature": 0, "ignore_eos": True, **options}
        )
        return engine().generate([text], params)[0][0]

    stop = reply.tokens[6]
    where = reply.tokens.index(stop)
    by_id = run(stop_token_ids=(stop,))
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", stop)
    assert by_id.tokens == reply.tokens[: where + 1]
    assert by_id.text == ByteTokenizer().decode(reply.tokens[:where])
    assert run(max_tokens=0).tokens == [] and run(max_tokens=0).finish_reason == "length"
    empty = engine().generate([text], SamplingParams(max_tokens=0, n=3))[0]
    assert [(c.tokens, c.finish_reason) for c in empty] == [([], "length")] * 3


def test_routes_are_those_of_the_whole_text(model, engine):
    text = prompts([50])[0]
    params = SamplingParams(max_tokens=8, seed=1, return_routes=True, ignore_eos=True)
    inference = engine(return_routes=True, max_batch_tokens=20)
    for _ in range(2):  # the second time, most come from the cache
        choice = inference.generate([text], params)[0][0]
        tokens = torch.tensor([[*text, *choice.tokens[:-1]]])
        with torch.no_grad():
            output = model(tokens, ctx=Context(report=frozenset({"routes"})))
        expected = torch.stack([r.index_THK.flatten(1) for r in output.routes], 1)
        gates = torch.stack([r.gate_THK.flatten(1) for r in output.routes], 1)
        experts_TLC, gates_TLC = choice.routes
        assert experts_TLC.shape == gates_TLC.shape == (57, 2, 4)
        assert (experts_TLC == expected.numpy()).all()
        assert np.abs(gates_TLC - gates.numpy()).max() < 1e-6 and gates_TLC.dtype == np.float32
    assert inference.counters.cached_tokens == 48
    with pytest.raises(UsageError, match="keeps no routes"):
        engine().add(text, params)


@pytest.mark.parametrize("pages", [0, 9])
def test_routes_come_with_the_tokens(engine, pages):
    """The rows of a token come when it is read; also where pages are taken back in between."""
    params = SamplingParams(max_tokens=30, n=2, seed=1, return_routes=True, ignore_eos=True)
    plain = replace(params, return_routes=False)
    inference = engine(return_routes=True, cache_tokens=pages * PAGE, max_batch_tokens=20)
    texts = prompts([33, 20])
    whole = engine(return_routes=True).generate(texts, params)
    requests = [inference.add(text, params) for text in texts]
    other = inference.add([1, 2, 3], plain)
    parts: dict = {}
    while inference.has_work:
        for update in inference.step():
            parts.setdefault((update.request, update.choice), []).append(update.routes)
    assert parts[other, 0] == [None] * 30
    for request, choices in zip(requests, whole, strict=True):
        for i, choice in enumerate(choices):
            pieces = parts[request, i]
            assert [len(r.experts) for r in pieces] == [len(request.prompt)] + [1] * 29
            for joined, expected in zip(joined_routes(pieces), choice.routes, strict=True):
                assert (joined == expected).all()
    assert (inference.scheduler.n_preemptions > 0) == (pages > 0)


def test_what_can_never_run_is_refused(engine):
    inference = engine(cache_tokens=4 * PAGE)
    with pytest.raises(UsageError, match="70 tokens exceeds the cache of 64"):
        inference.add([1] * 60, SamplingParams(max_tokens=10))
    with pytest.raises(UsageError, match="256"):
        inference.add([1] * 250, SamplingParams(max_tokens=10))
    for token in (-1, 257):
        with pytest.raises(UsageError, match=f"the prompt has token {token}; ids are 0 … 256"):
            inference.add([1, token], GREEDY)
    with pytest.raises(UsageError, match="max_batch_tokens=8 must be above max_requests=8"):
        engine(max_batch_tokens=8)
    assert not inference.has_work


def test_a_mixer_without_pages_is_named(engine):
    from headway.model.build import build_block
    from headway.model.transformer import Transformer
    from headway.serve.engine import Engine
    from tests.model.own_modules import RunningMean
    from tests.serve.conftest import CONFIG

    def blocks(config, layer, compute):
        return build_block(config, layer, compute, mixer=RunningMean(config))

    with pytest.raises(UsageError, match="RunningMean, has no init_pages"):
        Engine(Transformer(CONFIG, blocks=blocks), ByteTokenizer(), EngineConfig(max_len=64))
