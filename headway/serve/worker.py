"""The engine in a thread of its own, for an asyncio server.

    worker = EngineThread(engine)
    async for update in worker.submit(prompt, params): …     # leaving the loop aborts the request
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


class EngineStopped(RuntimeError):
    """The engine has stopped; its message says why."""


class Stream:
    """The updates of one request, as they come; ends after the last choice has ended."""

    def __init__(self, worker: "EngineThread", n_choices: int):
        self._worker, self._unfinished = worker, n_choices
        self.request: Request | None = None
        """Set before the first update."""
        self.updates: asyncio.Queue[Update | Exception] = asyncio.Queue()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Update:
        if not self._unfinished:
            raise StopAsyncIteration
        update = await self.updates.get()
        if isinstance(update, Exception):
            self._unfinished = 0
            raise update
        self._unfinished -= update.finish_reason is not None
        return update

    def abort(self) -> None:
        """Drop the request, if it still runs."""
        if self._unfinished and self.request is not None:
            self._worker.abort(self.request.id)
        self._unfinished = 0


class EngineThread:
    """Runs an engine. Methods are called from the event loop that is running when it is made."""

    def __init__(self, engine: Engine):
        self.engine, self._loop = engine, asyncio.get_running_loop()
        self._commands: deque[Callable[[], None]] = deque()
        self._wake, self._stopping = threading.Event(), False
        self._streams: dict[Request, Stream] = {}
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @contextlib.asynccontextmanager
    async def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, salt: str = "", id: str = ""
    ) -> AsyncIterator[Stream]:
        """Run a request; gives its updates, and aborts it where the block is left before its end.

        Raises UsageError where it can never run, EngineStopped where the engine has."""
        stream = Stream(self, params.n)
        await self.call(lambda: self._add(stream, prompt, params, salt, id))
        try:
            yield stream
        finally:
            stream.abort()

    def abort(self, id: str) -> None:
        """Drop a request before the next step."""
        self._put(lambda: self._abort(id))

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

        if self._failed is not None or self._stopping:
            raise EngineStopped(str(self._failed or "the engine is stopping"))
        self._put(run)
        return await future

    async def drained(self) -> None:
        """Return when no request runs or waits."""
        while self._streams or self._commands:
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Drop what runs and end the thread."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def _put(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self.engine.has_work:
                    self._wake.wait()
                self._wake.clear()
                while self._commands:
                    self._commands.popleft()()
                if self.engine.has_work:
                    self._deliver(self.engine.step())
            error: Exception = EngineStopped("the engine has stopped")
        except Exception as failure:
            error = self._failed = failure
        for stream in self._streams.values():
            self._post([(stream, error)])
        while self._commands:
            self._commands.popleft()()
        self._streams.clear()

    def _add(
        self, stream: Stream, prompt: Sequence[int], params: SamplingParams, salt: str, id: str
    ) -> None:
        if self._stopping or self._failed is not None:
            raise EngineStopped("the engine has stopped")
        stream.request = self.engine.add(prompt, params, salt=salt, id=id)
        self._streams[stream.request] = stream

    def _abort(self, id: str) -> None:
        self.engine.abort(id)
        for request in [r for r in self._streams if r.id == id]:
            del self._streams[request]

    def _deliver(self, updates: list[Update]) -> None:
        self._post([(self._streams[u.request], u) for u in updates if u.request in self._streams])
        running = {s.request for s in self.engine.sequences}
        for update in updates:
            if update.finish_reason and update.request not in running:
                self._streams.pop(update.request, None)

    def _post(self, items: list[tuple[Stream, Update | Exception]]) -> None:
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
