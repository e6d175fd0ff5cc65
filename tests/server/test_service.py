"""Calls on an engine, without HTTP: admission, the log line, the end."""

import asyncio
import re

import pytest

from headway.config import ServerConfig
from headway.hub.load import load_model
from headway.server import service as module
from headway.server.errors import BadRequest
from headway.server.load import load_served
from headway.server.service import Service


@pytest.fixture(scope="module")
def loaded(run):
    return load_model(run, "cpu", "float32")


def run_with(loaded, body, **options):
    async def main():
        service = Service(load_served(loaded, ServerConfig(**options)))
        try:
            return await body(service)
        finally:
            await service.worker.stop()

    return asyncio.run(asyncio.wait_for(main(), 60))


def call_of(service, **fields):
    import json

    return service.served.protocol.completion(json.dumps({"prompt": "x", **fields}).encode())


def test_one_line_for_a_time_in_which_there_was_work(loaded, monkeypatch, capsys):
    monkeypatch.setattr(module, "LOG_SECONDS", 0.3)

    async def body(service):
        log = asyncio.create_task(service.log())
        await asyncio.sleep(0.4)
        before = capsys.readouterr().err
        await service.whole(call_of(service, max_tokens=30, ignore_eos=True), "a")
        await asyncio.sleep(1.2)
        log.cancel()
        return before, capsys.readouterr().err

    before, after = run_with(loaded, body)
    assert before == "" and len(after.splitlines()) == 1
    pattern = r"headway: 0 replies run, 0 wait; 100\.0 tokens/s written, 3\.3 read, 0\.0 of them cached; 0 of \d+ blocks held; \d+\.\d experts touched per step\n"
    assert re.fullmatch(pattern, after), after


def test_replies_are_counted_and_given_back(loaded):
    async def body(service):
        call = call_of(service, n=3, max_tokens=200, ignore_eos=True, stream=True)
        events = service.events(call, "a")
        assert await anext(events) == b""
        with pytest.raises(BadRequest) as caught:
            await service.whole(call_of(service, n=2), "b")
        assert caught.value.status == 429
        await service.whole(call_of(service, max_tokens=1), "c")
        await events.aclose()
        await asyncio.wait_for(service.drained(), 5)
        await service.whole(call_of(service, n=4, max_tokens=1), "d")
        return service.n_calls

    assert run_with(loaded, body, max_requests=2, max_waiting=2) == 3


def test_a_call_that_the_engine_refuses_is_given_back_too(loaded):
    async def body(service):
        call = call_of(service, max_tokens=1)
        service.worker.engine.max_len = 1
        with pytest.raises(ValueError, match="do not fit"):
            await service.whole(call, "a")
        await asyncio.wait_for(service.drained(), 5)

    run_with(loaded, body)


def test_a_stream_that_is_cut_off_ends_with_an_error_and_done(loaded):
    async def body(service):
        call = call_of(service, max_tokens=200, ignore_eos=True, stream=True)
        parts = []
        async for part in service.events(call, "a"):
            parts.append(part)
            if len(parts) == 3:
                await service.worker.stop()
        return parts

    last = run_with(loaded, body)[-1]
    assert b'"code": "server_stopping"' in last and last.endswith(b"data: [DONE]\n\n")
