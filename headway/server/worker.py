"""The engine in a thread of its own, for an asyncio server.

    worker = EngineThread(engine)
    async with worker.submit([prompt], params) as stream:    # leaving the block aborts what runs
        async for updates in stream: …                       # those of one step
    await worker.stop()

The thread takes requests between two steps and sleeps, without using a core, where there are none.
Updates of one step reach the event loop together."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from headway.serve.request import Request, Update

MAX_FAILED_STEPS = 3
"""Steps that may fail, one after another, before the engine stops."""


class EngineError(RuntimeError):
    """What ends a stream before its last choice has ended."""


class EngineStopped(EngineError):
    """The engine has stopped; its message says why."""


class StepFailed(EngineError):
    """A step that a request was in has failed, and with it the request; the engine goes on."""


class Stream:
    """The updates of some requests, step by step; ends after the last choice has ended."""

    def __init__(self, n_choices: int):
        self._unfinished = n_choices
        self.requests: list[Request] = []
        """One per prompt, in their order."""
        self.updates: asyncio.Queue[list[Update] | EngineError] = asyncio.Queue()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> list[Update]:
        if not self._unfinished:
            raise StopAsyncIteration
        updates = await self.updates.get()
        if isinstance(updates, EngineError):
            self._unfinished = 0
            raise updates
        self._unfinished -= sum(update.finish_reason is not None for update in updates)
        return updates


class EngineThread:
    """Runs an engine. Methods are called from the event loop that is running when it is made.

    Args:
        on_step: is called in the engine's thread after each step.
        on_failure: is called there with what a step raised and the number of requests it ended,
            where the engine goes on. Several such steps one after another end it, and one on a
            mesh."""

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[], None] = lambda: None,
        on_failure: Callable[[Exception, int], None] = lambda error, n_requests: None,
    ):
        self.engine, self._loop = engine, asyncio.get_running_loop()
        self._on_step, self._on_failure = on_step, on_failure
        self._n_failed_steps = 0
        self._commands: deque[Callable[[], None]] = deque()
        self._wake, self._stopping = threading.Event(), False
        self._streams: dict[Request, Stream] = {}
        self._ended: EngineStopped | None = None
        self.ended = asyncio.Event()
        """Set when the thread has ended, by `stop` or by a failure."""
        self.failure: Exception | None = None
        """What a step or command raised; it ended the thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Return whether requests are taken."""
        return self._ended is None and not self._stopping

    @contextlib.asynccontextmanager
    async def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, salt: str = ""
    ) -> AsyncIterator[Stream]:
        """Run a request per prompt; gives their updates, and aborts those that still run where the
        block is left.

        Raises UsageError where one can never run, EngineStopped where the engine has; the stream
        raises StepFailed where a step with one of its requests fails."""
        stream = Stream(len(prompts) * params.n)
        try:
            await self.call(lambda: self._add(stream, prompts, params, salt))
            yield stream
        finally:  # also where the caller is cancelled before the engine has taken the requests
            self._put(lambda: self._abort(stream))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the engine's thread between two steps; return its result."""
        future = self._loop.create_future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                self._loop.call_soon_threadsafe(_fail, future, error)
            else:
                self._loop.call_soon_threadsafe(_resolve, future, result)

        self._check()
        self._put(run)
        return await future

    async def stop(self) -> None:
        """Drop what runs and end the thread."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def _check(self) -> None:
        """Raise EngineStopped where no request is taken."""
        if not self.running:
            raise self._ended or EngineStopped("the engine is stopping")

    def _put(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _run(self) -> None:
        error = EngineStopped("the engine has stopped")
        try:
            while not self._stopping:
                if not self.engine.has_work and not self._wake.wait(self.engine.runner.idle_after):
                    self.engine.runner.idle()
                    continue
                self._wake.clear()
                while self._commands:
                    self._commands.popleft()()
                if self.engine.has_work:
                    self._step()
        except Exception as failure:
            self.failure = failure
            error = EngineStopped(f"the engine failed: {type(failure).__name__}: {failure}")
        self._ended = error
        for stream in set(self._streams.values()):
            self._abort(stream)
            self._post([(stream, error)])
        while self._commands:
            self._commands.popleft()()
        if self.failure is None:  # else other processes do not answer
            try:
                self.engine.runner.close()
            except RuntimeError as failure:  # one of them is gone
                self.failure = failure
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.ended.set)

    def _step(self) -> None:
        """Run a step. What it raises ends the streams of the requests that it ended; raise it again
        where the engine cannot go on."""
        try:
            updates = self.engine.step()
        except Exception as error:
            self._n_failed_steps += 1
            there = {sequence.request for sequence in self.engine.sequences}
            failed = [request for request in self._streams if request not in there]
            if not (failed and self.engine.runner.recovers):
                raise
            self._on_failure(error, len(failed))
            for stream in {self._streams[request] for request in failed}:
                self._abort(stream)
                self._post([(stream, StepFailed("a step of the engine failed"))])
            if self._n_failed_steps == MAX_FAILED_STEPS:
                raise
        else:
            self._n_failed_steps = 0
            self._on_step()
            self._deliver(updates)

    def _add(
        self, stream: Stream, prompts: Sequence[Sequence[int]], params: SamplingParams, salt: str
    ) -> None:
        self._check()
        for prompt in prompts:
            request = self.engine.add(prompt, params, salt=salt)
            stream.requests.append(request)
            self._streams[request] = stream

    def _abort(self, stream: Stream) -> None:
        for request in stream.requests:
            if self._streams.pop(request, None) is not None:
                self.engine.abort(request.id)

    def _deliver(self, updates: list[Update]) -> None:
        """Give each stream what a step adds to it."""
        parts: dict[Stream, list[Update]] = {}
        for update in updates:
            parts.setdefault(self._streams[update.request], []).append(update)
        self._post(list(parts.items()))
        running = {sequence.request for sequence in self.engine.sequences}
        for update in updates:
            if update.finish_reason and update.request not in running:
                self._streams.pop(update.request, None)

    def _post(self, items: Sequence[tuple[Stream, list[Update] | EngineError]]) -> None:
        def put() -> None:
            for stream, item in items:
                stream.updates.put_nowait(item)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(put)


def _resolve(future: asyncio.Future, result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future, error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
