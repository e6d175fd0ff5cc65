"""What stands before every endpoint: who may ask, and how much may be sent how slowly.

An ASGI application around the server's own, since Starlette's middleware classes copy every chunk
of a stream through a queue."""

import asyncio
import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from headway.server.errors import BadRequest, error_json

Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]

OPEN_PATHS = ("/health", "/", "/page.js", "/page.css")
"""Need no key: they tell nothing, and the page asks for the key."""


class Guard:
    """Refuses requests with a foreign `Host`, without the key, with a body that is too large or
    comes too slowly; gives each an id.

    Args:
        hosts: names that `Host` may have; () allows all. Where a server listens on loopback, a
        page of a foreign site whose name was rebound to 127.0.0.1 names that site there.
        keys: API keys, one of which is needed; () needs none.
        max_body: bytes.
        body_seconds: for the whole body."""

    def __init__(
        self,
        app: App,
        hosts: Sequence[str],
        keys: Sequence[str],
        max_body: int,
        body_seconds: float,
    ) -> None:
        self.app, self._hosts = app, tuple(hosts)
        self._keys = [key.encode() for key in keys]
        self._max_body, self._body_seconds = max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        request_id = secrets.token_hex(12)
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        async def send_with_id(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check_host(headers.get(b"host", b""))
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers.get(b"authorization", b""))
            if scope["method"] in ("GET", "HEAD"):  # uvicorn leaves the body of a HEAD out
                return await self.app({**scope, "method": "GET"}, receive, send_with_id)
            body = await self._read(headers, receive)
        except BadRequest as error:
            return await _answer(error, send_with_id)
        except ConnectionError:
            return
        sent = False

        async def receive_body() -> dict[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_body, send_with_id)

    def _check_host(self, host: bytes) -> None:
        name = host.decode("latin-1").lower()
        name = name[: name.rfind("]") + 1] if name.startswith("[") else name.partition(":")[0]
        if self._hosts and name not in self._hosts:
            why = f"the Host header names {name[:60]!r}, and this server answers on loopback alone"
            raise BadRequest(f"{why}; use {self._hosts[0]}", None, 403, "host_not_allowed")

    def _check_key(self, header: bytes) -> None:
        scheme, _, given = header.partition(b" ")
        # every key is compared, so that the time tells nothing
        fits = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if self._keys and not (scheme.lower() == b"bearer" and any(fits)):
            what = "the API key is wrong" if given else "there is no API key"
            fix = "send `Authorization: Bearer KEY`"
            raise BadRequest(f"{what}; {fix}", None, 401, "invalid_api_key")

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Return the body. Raises BadRequest where it is too long or slow, ConnectionError where
        the client leaves."""
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError
                    body += message.get("body", b"")
                    if len(body) > self._max_body:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            why = f"the body took more than {self._body_seconds:g} s"
            raise BadRequest(why, None, 408, "body_timeout") from None

    def _too_large(self) -> BadRequest:
        why = f"the body is larger than {self._max_body} bytes; --max-body raises the limit"
        return BadRequest(why, None, 413, "body_too_large")


def hosts_of(host: str) -> tuple[str, ...]:
    """Return the `Host` names that a server listening on `host` answers to; () for all, where it
    is no loopback address."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        return ()
    name = f"[{host}]" if ":" in host else host
    return tuple(dict.fromkeys((name.lower(), "127.0.0.1", "localhost", "[::1]")))


async def _answer(error: BadRequest, send: Send) -> None:
    """Send the reply to a refused request; the connection is closed, since its body may still be
    on the way."""
    body = error_json(error).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
