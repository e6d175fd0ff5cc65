"""Calls of functions in the text of a reply: JSON in `<tool_call>` tags, or the whole text."""

import json
import secrets
from typing import NamedTuple

from headway.server.fields import Json

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """A call that the model wrote."""

    id: str
    name: str
    arguments: str
    """A JSON object, as text."""

    def json(self) -> dict[str, Json]:
        """Return it in OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def parse_call(text: str) -> ToolCall | None:
    """Return the call `{"name", "arguments"}` that a text holds, None if it holds something else.
    `arguments` may be an object, or its JSON as text."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(
        f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False)
    )


class ToolCallParser:
    """Divides a streamed reply into text and calls. What may yet become a tag is held back; tags
    around something else stay text. With `whole`, the reply is one call without tags."""

    def __init__(self, whole: bool) -> None:
        self.calls: list[ToolCall] = []
        self._whole, self._held = whole, ""

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the text and the calls that more of the reply completes."""
        self._held += text
        content, before = "", len(self.calls)
        while not self._whole:
            start = self._held.find(OPEN)
            if start < 0:
                keep = _unfinished(self._held)
                content += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            content, self._held = content + self._held[:start], self._held[start:]
            end = self._held.find(CLOSE)
            if end < 0:
                break
            call = parse_call(self._held[len(OPEN) : end])
            if call is None:
                content += self._held[: end + len(CLOSE)]
            else:
                self.calls.append(call)
            self._held = self._held[end + len(CLOSE) :]
        return content, self.calls[before:]

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return what is left at the end of the reply."""
        call = parse_call(self._held) if self._whole else None
        if call is None:
            return self._held, []
        self.calls.append(call)
        return "", [call]


def _unfinished(text: str) -> int:
    """Return how many characters at the end of `text` may start a tag."""
    return next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
