"""From the engine's updates to replies in OpenAI's form, whole or as the events of a stream."""

import base64
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headway.serve.request import Request, Update
from headway.serve.routes import Routes, joined_routes
from headway.serve.sampling import TokenLogprob
from headway.server.fields import Json
from headway.server.logprobs import TextOffsets, TokenTexts, chat_logprobs, completion_logprobs
from headway.server.protocol import Call
from headway.server.tool_calls import ToolCall, ToolCallParser


@dataclass
class _Choice:
    """What has been said of one choice."""

    offsets: TextOffsets
    tools: ToolCallParser | None
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    routes: list[Routes] = field(default_factory=list)
    begun: bool = False

    @property
    def score(self) -> float:
        """Return the mean log-probability of its tokens."""
        return sum(t.logprob for t in self.logprobs) / max(len(self.logprobs), 1)


class Reply:
    """The reply to one call: takes updates, gives the events of a stream or one object."""

    def __init__(self, call: Call, model: str, fingerprint: str, texts: TokenTexts, id: str):
        self.call, self._texts = call, texts
        kind = "chat.completion" if call.chat else "text_completion"
        self._frame = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{id}",
            "object": f"{kind}.chunk" if call.chat and call.stream else kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
            **call.labels,
        }
        whole = call.tools in ("required", "named")
        self._choices = [
            _Choice(
                TextOffsets(texts, call.params.skip_special_tokens),
                ToolCallParser(whole) if call.tools else None,
            )
            for _ in range(len(call.prompts) * call.params.n)
        ]
        self._requests: dict[int, Request] = {}

    def add(self, index: int, update: Update) -> Json | None:
        """Take an update of a choice; its index counts those of all prompts. Return the choice as
        the event of a stream has it; None where there is nothing to say yet."""
        self._requests[index // self.call.params.n] = update.request
        choice = self._choices[index]
        text, calls = update.text, []
        if choice.tools is not None:
            text, calls = choice.tools.add(text)
            if update.finish_reason:
                more, last = choice.tools.finish()
                text, calls = text + more, calls + last
        first, choice.begun = not choice.begun, True
        choice.text.append(text)
        choice.tokens += update.tokens
        choice.logprobs += update.logprobs
        choice.calls += calls
        choice.finish_reason, choice.stop_reason = update.finish_reason, update.stop_reason
        routes = [] if update.routes is None else [update.routes]
        choice.routes += routes
        if choice.calls and choice.finish_reason == "stop" and self.call.tools != "named":
            choice.finish_reason = "tool_calls"
        if not self.call.stream:
            return None
        said = text or calls or first or update.finish_reason or self.call.return_token_ids
        if not (said or routes) and not (update.logprobs and self.call.logprobs):
            return None
        event = self._said(index, first, text, update.tokens, update.logprobs, routes)
        if not self.call.chat:
            return event
        delta: dict[str, Json] = {"role": "assistant", "content": ""} if first else {}
        if text:
            delta["content"] = text
        if calls:
            start = len(choice.calls) - len(calls)
            delta["tool_calls"] = [{"index": start + i, **c.json()} for i, c in enumerate(calls)]
        return {**event, "delta": delta}

    def event(self, choices: Sequence[Json], usage: bool = False) -> bytes:
        """Return choices, or with `usage` the count of tokens, as an event of the stream."""
        frame = {**self._frame, "choices": choices}
        if self.call.include_usage:
            frame["usage"] = self.usage() if usage else None
        return server_event(frame)

    def whole(self) -> Json:
        """Return the reply as one object."""
        n, best_of = self.call.n, self.call.params.n
        choices: list[Json] = []
        for prompt in range(len(self.call.prompts)):
            indices: Iterable[int] = range(prompt * best_of, (prompt + 1) * best_of)
            if best_of > n:
                indices = sorted(indices, key=lambda i: -self._choices[i].score)[:n]
            for index in indices:
                choice = self._choices[index]
                text = "".join(choice.text)
                said = self._said(index, True, text, choice.tokens, choice.logprobs, choice.routes)
                if self.call.chat:
                    said["message"] = _message(text, choice.calls)
                choices.append({**said, "index": len(choices)})
        return {**self._frame, "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Return how many tokens were read, found in the cache, and written."""
        read = sum(map(len, self.call.prompts))
        written = sum(len(choice.tokens) for choice in self._choices)
        cached = sum(request.n_cached for request in self._requests.values())
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _said(
        self,
        index: int,
        first: bool,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        routes: Sequence[Routes],
    ) -> dict[str, Any]:
        """Return what a reply says of a choice: of all its tokens, or of the next. `first`: the
        prompt has not been echoed."""
        call, choice = self.call, self._choices[index]
        prompt = index // call.params.n
        scored: list[TokenLogprob | int] = list(logprobs)
        if call.echo and first:
            text = call.texts[prompt] + text
            known = self._requests[prompt].prompt_logprobs[1:]
            scored = [call.prompts[prompt][0], *filter(None, known), *scored]
        said: dict[str, Any] = {"index": index, "logprobs": None}
        if not call.chat:
            said["text"] = text
        if call.logprobs and call.chat:
            said["logprobs"] = chat_logprobs(logprobs, self._texts)
        elif call.logprobs:
            said["logprobs"] = completion_logprobs(scored, self._texts, choice.offsets)
        said["finish_reason"] = choice.finish_reason
        said["stop_reason"] = choice.stop_reason
        if call.return_token_ids:
            said["token_ids"] = list(tokens)
            if first:
                said["prompt_token_ids"] = call.prompts[prompt]
        if routes:
            experts, gates = joined_routes(routes)
            if call.return_experts:
                said["routed_experts"] = base64.b64encode(experts.tobytes()).decode()
            if call.return_gates:
                said["expert_gates"] = base64.b64encode(gates.tobytes()).decode()
        return said


def server_event(value: Json) -> bytes:
    """Return a value as a server-sent event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n".encode()


DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def _message(text: str, calls: Sequence[ToolCall]) -> Json:
    message: dict[str, Json] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [call.json() for call in calls]
        message["content"] = (text.strip() and text) or None
    return message
