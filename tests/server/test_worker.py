"""The engine's thread: streams, leaving, failures, and no work without requests."""

import asyncio
import threading
import time

import pytest

from headway.config import UsageError
from headway.serve.params import SamplingParams
from headway.server.worker import EngineStopped, EngineThread

PARAMS = SamplingParams(max_tokens=15, temperature=0, ignore_eos=True)


def run(engine, body):
    async def main():
        worker = EngineThread(engine)
        try:
            return await body(worker)
        finally:
            await worker.stop()

    return asyncio.run(asyncio.wait_for(main(), 60))


async def collect(worker, prompt, params=PARAMS):
    async with worker.submit([prompt], params) as stream:
        return [token async for updates in stream for u in updates for token in u.tokens]


def test_streams_give_what_generate_gives(engine):
    texts = [[5, 6, 7], [1] * 40, [9]]
    expected = [c[0].tokens for c in engine().generate(texts, PARAMS)]

    async def body(worker):
        return await asyncio.gather(*(collect(worker, text) for text in texts))

    assert run(engine(), body) == expected


def test_who_leaves_frees_the_pages(engine):
    inference = engine()

    async def body(worker):
        async with worker.submit([[1] * 20], SamplingParams(max_tokens=200)) as stream:
            async for _ in stream:
                break
        await worker.call(lambda: None)
        return inference.has_work, inference.scheduler.n_held, inference.counters.aborted

    assert run(inference, body) == (False, 0, 1)


def test_who_leaves_before_the_engine_has_taken_the_request(engine):
    inference = engine()

    async def body(worker):
        held, release = threading.Event(), threading.Event()
        blocked = asyncio.ensure_future(worker.call(lambda: (held.set(), release.wait(10))))
        await asyncio.to_thread(held.wait)
        task = asyncio.ensure_future(collect(worker, [1], SamplingParams(max_tokens=200)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        await blocked
        await worker.call(lambda: None)
        return inference.has_work

    assert run(inference, body) is False


def test_several_prompts_are_one_stream(engine):
    inference, texts = engine(), [[5, 6, 7], [1] * 40]
    expected = [c[0].tokens for c in inference.generate(texts, PARAMS)]

    async def body(worker):
        async with worker.submit(texts, PARAMS) as stream:
            updates = [u async for step in stream for u in step]
            return [
                [t for u in updates if u.request is r for t in u.tokens] for r in stream.requests
            ]

    assert run(inference, body) == expected


def test_a_request_that_can_never_run_leaves_others_alone(engine):
    async def body(worker):
        with pytest.raises(UsageError, match="top_p"):
            await collect(worker, [1], SamplingParams(top_p=0.0))
        return len(await collect(worker, [1]))

    assert run(engine(), body) == 15


def test_a_failing_step_ends_all_streams_with_its_reason(engine, monkeypatch):
    inference = engine()

    def fail():
        raise RuntimeError("out of memory")

    async def body(worker):
        monkeypatch.setattr(inference, "step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            await collect(worker, [1])
        with pytest.raises(EngineStopped, match="out of memory"):
            await collect(worker, [1])

    run(inference, body)


def test_idle_uses_no_core(engine):
    async def body(worker):
        await collect(worker, [1])
        begin = time.process_time()
        await asyncio.sleep(0.5)
        return time.process_time() - begin

    assert run(engine(), body) < 0.1


def test_stop_ends_what_runs(engine):
    async def body(worker):
        async with worker.submit([[1]], SamplingParams(max_tokens=250)) as stream:
            await anext(stream)
            await worker.stop()
            with pytest.raises(EngineStopped):
                while True:
                    await anext(stream)

    inference = engine()
    run(inference, body)
    assert inference.scheduler.n_held == 0
