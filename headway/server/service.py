"""What the endpoints share: admission, running a call on the engine, ending, the log line."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from time import monotonic
from typing import NamedTuple

from headway.serve.engine import Engine
from headway.server.errors import BadRequest, error_json
from headway.server.fields import Json
from headway.server.logprobs import TokenTexts
from headway.server.metrics import Metrics
from headway.server.protocol import Call, Protocol
from headway.server.reply import DONE, Reply
from headway.server.worker import EngineError, EngineStopped, EngineThread

LOG_SECONDS = 10.0
FAILED = BadRequest("the engine failed in a step of this request", None, 500, "engine_failed")
STOPPED = BadRequest("the server is stopping; ask again later", None, 503, "server_stopping")


class Served(NamedTuple):
    """A model that is ready, and what requests to it are read against."""

    engine: Engine
    protocol: Protocol
    fingerprint: str
    """Of weights, dtype and version."""
    max_choices: int
    """Replies that run or wait; past it requests are refused."""


class Service:
    """Runs calls on the engine, in the event loop that is running when it is made."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.metrics = Metrics(served.engine)
        self.worker = EngineThread(served.engine, self.metrics.observe_step, log_failure)
        self.texts = TokenTexts(served.protocol.tokenizer)
        self.draining = False
        self.n_calls = 0
        """Served since the start."""
        self._choices = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._working = asyncio.Event()

    async def whole(self, call: Call, id: str) -> Json:
        """Run a call; return the reply."""
        reply = self._reply(call, id)
        async for _ in self._run(call, reply):
            pass
        return reply.whole()

    async def events(self, call: Call, id: str) -> AsyncIterator[bytes]:
        """Run a call; yield the events of its stream. The first is empty and comes when the engine
        has taken the request; a request that is refused raises before it."""
        reply = self._reply(call, id)
        try:
            async for events in self._run(call, reply):
                yield b"".join(reply.event([event]) for event in events)
        except EngineError as error:
            yield f"data: {error_json(answer_to(error))}\n\n".encode() + DONE
            return
        yield (reply.event([], usage=True) if call.include_usage else b"") + DONE

    async def drained(self) -> None:
        """Return when no call runs."""
        await self._idle.wait()

    async def log(self) -> None:
        """Write one line for every 10 s in which there was work, for ever."""
        engine, seconds = self.served.engine, LOG_SECONDS
        while True:
            before = replace(engine.counters)  # nothing changes until there is work
            await self._working.wait()
            await asyncio.sleep(seconds)
            now, scheduler = engine.counters, engine.scheduler
            steps = max(now.steps - before.steps, 1)
            touched = (now.total_touched - before.total_touched) / steps
            busiest = (now.total_busiest - before.total_busiest) / steps
            share = f", {busiest:.1f} on the busiest rank" if engine.runner.mesh.size > 1 else ""
            print(
                f"headway: {len(scheduler.running)} replies run, {len(scheduler.waiting)} wait; "
                f"{(now.generation_tokens - before.generation_tokens) / seconds:.1f} tokens/s "
                f"written, {(now.prompt_tokens - before.prompt_tokens) / seconds:.1f} read, "
                f"{(now.cached_tokens - before.cached_tokens) / seconds:.1f} of them cached; "
                f"{scheduler.n_held} of {scheduler.n_pages} blocks held; "
                f"{touched:.1f} experts touched per step{share}",
                file=sys.stderr,
                flush=True,
            )
            if self._idle.is_set():
                self._working.clear()

    def _reply(self, call: Call, id: str) -> Reply:
        name, fingerprint = self.served.protocol.name, self.served.fingerprint
        return Reply(call, name, fingerprint, self.texts, id)

    async def _run(self, call: Call, reply: Reply) -> AsyncIterator[list[Json]]:
        """Yield what each step adds to a reply; first nothing, when the engine has the call."""
        size = len(call.prompts) * call.params.n
        self._admit(size)
        try:
            begin = monotonic()
            last: dict[int, float] = {}
            async with self.worker.submit(call.prompts, call.params, salt=call.salt) as stream:
                yield []
                async for updates in stream:
                    now, events = monotonic(), []
                    for update in updates:
                        index = (
                            stream.requests.index(update.request) * call.params.n + update.choice
                        )
                        before = last.get(index)
                        if before is None:
                            self.metrics.first_token.observe(now - begin)
                        else:
                            self.metrics.between_tokens.observe(now - before)
                        last[index] = now
                        event = reply.add(index, update)
                        if event is not None:
                            events.append(event)
                    if events:
                        yield events
        finally:
            self._choices -= size
            if not self._choices:
                self._idle.set()

    def _admit(self, size: int) -> None:
        """Count the choices of a call, or refuse it."""
        most = self.served.max_choices
        if self.draining:
            raise STOPPED
        if size > most:
            why = f"{size} replies at once; this server takes at most {most} (--max-waiting)"
            raise BadRequest(why, "n")
        if self._choices + size > most:
            why = f"{self._choices} replies run or wait and the server takes at most {most}"
            raise BadRequest(f"{why}; try again later", None, 429, "server_busy")
        self._choices += size
        self.n_calls += 1
        self._idle.clear()
        self._working.set()


def answer_to(error: EngineError) -> BadRequest:
    """Return what a client is told of a request that the engine ended."""
    return STOPPED if isinstance(error, EngineStopped) else FAILED


def log_failure(error: Exception, n_requests: int) -> None:
    """Write one line on a step that failed."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(f"headway: a step failed and ended {n_requests} requests: {what}", file=sys.stderr)
