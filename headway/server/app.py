"""The endpoints: FastAPI for paths and the OpenAPI description, the bodies read by `protocol`."""

import asyncio
import difflib
import json
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from headway import __version__
from headway.config import UsageError
from headway.server.errors import BadRequest, error_json
from headway.server.fields import Json, Record
from headway.server.service import STOPPED, Service, answer_to
from headway.server.worker import EngineError

if TYPE_CHECKING:
    from fastapi import FastAPI

PAGE = Path(__file__).parent / "page"
PAGE_POLICY = "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
"""The page loads nothing from another host and sends nothing there."""
T = TypeVar("T")


class _Gone(Exception):
    """The client left."""


def build_app(service: Service) -> "FastAPI":
    """Return the application of a server that is ready."""
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import FileResponse, StreamingResponse
    from starlette.exceptions import HTTPException

    protocol = service.served.protocol
    bodies = protocol.bodies
    app = FastAPI(
        title="headway serve",
        version=__version__,
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
        redirect_slashes=False,
    )

    def answer(value: Json, status: int = 200) -> Response:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return Response(text, status, media_type="application/json")

    def refusal(error: UsageError) -> Response:
        status = error.status if isinstance(error, BadRequest) else 400
        headers = {"retry-after": "1"} if status in (429, 503) else None
        return Response(error_json(error), status, headers, "application/json")

    async def body_of(request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # what a page of another site can send without asking first is text/plain or a form
            why = f"the Content-Type is {kind[:60] or 'missing'}; use application/json"
            raise BadRequest(why, None, 415, "unsupported_media_type")
        return await request.body()

    async def until_gone(request: Request, work: Awaitable[T]) -> T:
        """Return the result of `work`, which is cancelled when the client leaves: Starlette looks
        for that in streams alone."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Gone
            return task.result()
        finally:
            gone.cancel()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run(request: Request, call: Any) -> Response:
        id = request.state.request_id
        if not call.stream:
            return answer(await until_gone(request, service.whole(call, id)))
        events = service.events(call, id)
        await until_gone(request, anext(events))
        return StreamingResponse(events, media_type="text/event-stream; charset=utf-8")

    @app.post("/v1/completions", **_described(bodies.completion, "Complete texts."))
    async def completions(request: Request) -> Response:
        call = await asyncio.to_thread(protocol.completion, await body_of(request))
        return await run(request, call)

    @app.post("/v1/chat/completions", **_described(bodies.chat, "Answer a conversation."))
    async def chat(request: Request) -> Response:
        call = await asyncio.to_thread(protocol.chat, await body_of(request))
        return await run(request, call)

    @app.post("/tokenize", **_described(bodies.tokenize, "Return the token ids of a text."))
    async def tokenize(request: Request) -> Response:
        ids, texts = await asyncio.to_thread(protocol.tokenize, await body_of(request))
        reply = {"count": len(ids), "max_model_len": protocol.bounds.max_len, "tokens": ids}
        strings = {"token_strs": [service.texts.text(i) for i in ids]} if texts else {}
        return answer({**reply, **strings})

    @app.post("/detokenize", **_described(bodies.detokenize, "Return the text of token ids."))
    async def detokenize(request: Request) -> Response:
        text = await asyncio.to_thread(protocol.detokenize, await body_of(request))
        return answer({"prompt": text})

    model = {
        "id": protocol.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "headway",
        "max_model_len": protocol.bounds.max_len,
        "routes": _routes(service),
    }

    @app.get("/v1/models", **_described(None, "List the one model."))
    async def models() -> Response:
        return answer({"object": "list", "data": [model]})

    @app.get("/v1/models/{name}", **_described(None, "Describe the model."))
    async def one_model(name: str) -> Response:
        if name != protocol.name:
            why = f"there is no model {name[:60]!r} here; use {protocol.name!r}"
            raise BadRequest(why, "model", 404, "model_not_found")
        return answer(model)

    @app.get("/health", **_described(None, "200 while requests are taken, 503 otherwise."))
    async def health() -> Response:
        if service.draining or not service.worker.running:
            raise STOPPED
        return answer({"status": "ok"})

    @app.get("/version", **_described(None, "The version of Headway."))
    async def version() -> Response:
        return answer({"version": __version__})

    @app.get("/metrics", **_described(None, "Metrics for Prometheus.", "text/plain"))
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(request: Request) -> Response:
        name = request.url.path.strip("/") or "index.html"
        return FileResponse(PAGE / name, headers={"content-security-policy": PAGE_POLICY})

    for path in ("/", "/page.js", "/page.css"):
        app.add_api_route(path, page, include_in_schema=False)

    @app.exception_handler(UsageError)
    async def usage_error(_: Request, error: UsageError) -> Response:
        return refusal(error)

    @app.exception_handler(EngineError)
    async def engine_error(_: Request, error: EngineError) -> Response:
        return refusal(answer_to(error))

    @app.exception_handler(_Gone)
    async def gone(_: Request, __: _Gone) -> Response:
        return Response(status_code=499)  # nobody reads it; the number is nginx's

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path, method = request.url.path, request.method
        if error.status_code == 405:
            why = f"{method} is not for {path[:60]}; see /openapi.json"
            reply = refusal(BadRequest(why, None, 405, "method_not_allowed"))
            reply.headers.update(error.headers or {})
            return reply
        near = difflib.get_close_matches(path[:60], app.openapi()["paths"], n=1)
        fix = f"did you mean {near[0]}?" if near else "see /openapi.json"
        return refusal(BadRequest(f"there is no {path[:60]}; {fix}", None, 404, "not_found"))

    @app.exception_handler(Exception)
    async def failure(_: Request, error: Exception) -> Response:
        return refusal(BadRequest("the server made a mistake", None, 500, "internal_error"))

    return app


def _routes(service: Service) -> Json:
    """Return the shape of `routed_experts`: the indices of the sparse layers, H, K and E; None
    where the engine keeps none."""
    blocks = service.served.engine.model.blocks()
    layers = [i for i, block in enumerate(blocks) if block.sparse is not None]
    sparse = service.served.engine.model.sparse_layers()
    if not (service.served.protocol.routes and sparse):
        return None
    moe = sparse[0].config
    sizes = {"heads": moe.n_heads, "top_k": moe.top_k, "experts": moe.n_experts}
    return {"layers": layers, **sizes}


async def _disconnected(request: Any) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _described(
    body: Record | None, summary: str, media: str = "application/json"
) -> dict[str, Any]:
    """Return what FastAPI says of an endpoint in the OpenAPI description."""
    error = {"application/json": {"schema": _ERROR}}
    statuses = (
        (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)
        if body
        else (401, 403, 404, 405, 503)
    )
    content: dict[str, Json] = {
        media: {"schema": {"type": "string" if "text" in media else "object"}}
    }
    extra: dict[str, Json] = {}
    if body is not None:
        extra["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body.schema}},
        }
        if "stream" in body.fields:
            content["text/event-stream"] = {"schema": _EVENT}
    return {
        "summary": summary,
        "response_model": None,
        "openapi_extra": extra,
        "responses": {
            200: {"description": "Done.", "content": content},
            **{status: {"description": "Refused.", "content": error} for status in statuses},
        },
    }


_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""An event of a stream: its data is a JSON object, or [DONE]."""
_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT,
                "code": _TEXT,
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
