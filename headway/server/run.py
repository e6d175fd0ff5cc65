"""The HTTP server: a socket, uvicorn, and signals. One process, an event loop and the engine's
thread.

It listens before the model is loaded; until then every answer is 503. SIGTERM or SIGINT drains it:
new requests are refused, those that run have `drain` seconds, what then still runs ends with an
error. A further SIGINT ends it at once."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from headway.config import ServerConfig, UsageError
from headway.server.app import build_app
from headway.server.connections import connection_class, most_connections
from headway.server.errors import BadRequest, error_json
from headway.server.guard import Guard, Receive, Scope, Send, hosts_of
from headway.server.service import Served, Service

T = TypeVar("T")
LOADING = BadRequest("the model is being loaded; ask again later", None, 503, "model_loading")


def serve(
    config: ServerConfig,
    keys: Sequence[str],
    load: Callable[[], Served],
    on_ready: Callable[[str, Served], None],
) -> dict[str, int] | None:
    """Serve the model that `load` returns until a signal; it runs in a thread of its own. Return
    `requests`, `generated_tokens` and `blocks_used`; None where it ended while loading.

    Args:
        keys: API keys, one of which is needed; () needs none.
        on_ready: gets the URL when the server answers.
    Raises: UsageError for an address that cannot be had, and what `load` raises."""
    listener = listen(config.host, config.port)
    return asyncio.run(_serve(config, keys, listener, load, on_ready))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. Raise UsageError where it cannot be."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: {error.strerror}; use 127.0.0.1") from None
    except (OSError, OverflowError) as error:
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        match number:
            case errno.EADDRINUSE:
                why, fix = "is in use", "use another, or --port 0 for a free one"
            case errno.EACCES:
                why, fix = "needs root", "use one from 1024 up"
            case _:
                why, fix = f"cannot be had ({error})", "use --host 127.0.0.1 --port 0"
        raise UsageError(f"--port {port} on {host} {why}; {fix}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL at which a bound socket answers."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def _serve(
    config: ServerConfig,
    keys: Sequence[str],
    listener: socket.socket,
    load: Callable[[], Served],
    on_ready: Callable[[str, Served], None],
) -> dict[str, int] | None:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # the signals are ours

    guard = Guard(_loading, hosts_of(config.host), keys, config.max_body, config.body_timeout)
    connection = connection_class(most_connections(config.max_connections), config.body_timeout)
    server = Server(
        uvicorn.Config(
            guard,  # type: ignore[arg-type]  # an ASGI application with our own type names
            http=connection,
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
    )
    stop = _stop_signal()
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(_in_thread(load))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return None
        served = loading.result()
        service = Service(served)
        guard.app = build_app(service)
        on_ready(url_of(listener), served)
        logging = asyncio.create_task(service.log())
        ended = asyncio.create_task(service.worker.ended.wait())
        await asyncio.wait((stopping, ended), return_when=asyncio.FIRST_COMPLETED)
        service.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.drained(), config.drain)
        await service.worker.stop()
        with contextlib.suppress(TimeoutError):  # for the last events to be sent
            await asyncio.wait_for(service.drained(), 2)
        logging.cancel()
        ended.cancel()
        if service.worker.failure is not None:
            raise service.worker.failure
        return {
            "requests": service.n_calls,
            "generated_tokens": served.engine.counters.generation_tokens,
            "blocks_used": served.engine.scheduler.n_held,
        }
    finally:
        server.should_exit = True
        await serving
        stopping.cancel()


def _stop_signal() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set; a SIGINT after that ends the process."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupt() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    return stop


async def _in_thread(function: Callable[[], T]) -> T:
    """Return the result of a function that runs in a thread which does not outlive the process, as
    those of `asyncio.to_thread` do."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            try:
                result = function()
            except Exception as error:
                loop.call_soon_threadsafe(future.set_exception, error)
            else:
                loop.call_soon_threadsafe(future.set_result, result)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await future


async def _loading(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 503 while the model is loaded."""
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": LOADING.status, "headers": headers})
    await send({"type": "http.response.body", "body": error_json(LOADING).encode()})
