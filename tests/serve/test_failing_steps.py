"""A pass that fails: what was in it ends, what was not goes on, and nothing of it stays."""

import copy

import pytest
import torch

from headway.config import EngineConfig, RunError
from headway.data.tokenizer import ByteTokenizer
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams

BAD = 255
"""A token whose embedding is NaN: a pass with it gives no number."""
PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture
def broken(model):
    """A model of which one token cannot be read."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embed.weight[BAD] = torch.nan
    return broken


def engine_of(model, **options):
    sizes = EngineConfig(**{"max_len": 256, "max_requests": 8, **options})
    return Engine(model, ByteTokenizer(), sizes)


def finish(engine):
    """The tokens of each request that runs to its end."""
    tokens = {}
    while engine.has_work:
        for update in engine.step():
            tokens.setdefault(update.request, []).extend(update.tokens)
    return tokens


@pytest.mark.parametrize("pages", [0, 6])
def test_only_what_was_in_the_pass_ends(model, broken, pages):
    """One decodes, one is read and fills the pass, one waits: with room for it or without."""
    engine = engine_of(broken, max_requests=3, max_batch_tokens=32, cache_tokens=16 * pages)
    prompts = [[1] * 20, [3] * 35]
    alone = [engine_of(model).generate([p], PARAMS)[0][0].tokens for p in prompts]
    first = engine.add(prompts[0], PARAMS)
    engine.step()
    bad = engine.add([7] * 20 + [BAD] + [7] * 10, PARAMS)
    last = engine.add(prompts[1], PARAMS)
    with pytest.raises(RunError, match="largest logit is nan"):
        engine.step()
    requests = {sequence.request for sequence in engine.sequences}
    assert first not in requests and bad not in requests and last in requests
    assert engine.counters.failed == 2 and engine.counters.failed_steps == 1
    assert finish(engine)[last] == alone[1]
    again = engine.add(prompts[0], PARAMS)
    assert finish(engine)[again] == alone[0]
    assert engine.scheduler.n_held == 0


def test_nothing_that_it_wrote_is_found_again(model, broken):
    """Pages are sealed before tokens are drawn: those of the failed pass hold NaN."""
    engine, prompt = engine_of(broken), [4] * 20 + [BAD] + [4] * 60
    for _ in range(2):
        with pytest.raises(RunError):
            engine.generate([prompt], PARAMS)
    broken.embed.weight.data.copy_(model.embed.weight.data)
    request = engine.add(prompt, PARAMS)
    tokens = finish(engine)[request]
    assert request.n_cached == 0
    assert tokens == engine_of(model).generate([prompt], PARAMS)[0][0].tokens


def test_what_was_known_before_stays_known(broken):
    engine, prompt = engine_of(broken), [4] * 40
    engine.generate([prompt], PARAMS)
    with pytest.raises(RunError):
        engine.generate([[*prompt, BAD]], PARAMS)
    request = engine.add(prompt, PARAMS)
    engine.step()
    assert request.n_cached == 32


def test_choices_and_windows_leave_nothing_either(broken):
    engine = engine_of(broken, cache_tokens=16 * 12)
    for prompt in ([1] * 20 + [BAD], [BAD]):
        with pytest.raises(RunError):
            engine.generate([prompt, [5] * 17], SamplingParams(max_tokens=9, n=4, ignore_eos=True))
        assert engine.sequences == [] and not engine.scheduler.waiting
        assert engine.scheduler.n_held == 0


def test_a_prompt_that_is_only_scored_fails_too(broken):
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    with pytest.raises(RunError, match="largest logit is nan"):
        engine_of(broken).generate([[1, BAD, 2]], params)


def test_a_pass_that_raises_midway(model, monkeypatch):
    """The head has lost a column: PyTorch refuses the product."""
    engine, prompt = engine_of(copy.deepcopy(model)), [6] * 50
    expected = engine.generate([[1] * 40], PARAMS)
    head = engine.model.head
    weight = head.weight
    head.weight = torch.nn.Parameter(weight[:, :-1].contiguous())
    with pytest.raises(RuntimeError, match="mat1 and mat2|size mismatch|must match"):
        engine.generate([prompt, [1] * 40], PARAMS)
    head.weight = weight
    assert engine.scheduler.n_held == 0
    assert engine.generate([[1] * 40], PARAMS) == expected
    request = engine.add(prompt, PARAMS)
    engine.step()
    assert request.n_cached == 0


def test_a_prompt_that_is_refused_takes_the_others_along(engine):
    inference = engine()
    with pytest.raises(ValueError, match="do not fit"):
        inference.generate([[1] * 5, [1] * 300], PARAMS)
    assert not inference.has_work
