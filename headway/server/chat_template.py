"""Chat templates: a conversation becomes token ids, as `apply_chat_template` of Transformers has
them, except that text inside a message never becomes a special token.

A template writes one text, in which `<|im_end|>` from a user looks like its own. So every special
name in the strings of a request is broken by a noncharacter before rendering (`Shield`); what is
whole in the rendered text is the template's, and stands for an id; then the noncharacters go, and
the text between is encoded with special names as text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from headway.config import UsageError
from headway.data.tokenizer import Tokenizer
from headway.hub.export_tokenizer import PLAIN_TEMPLATE
from headway.server.shield import Shield
from headway.server.template_sandbox import compile_template, render

TAG = "\ufdd1 "
"""Ends the message that a reply continues; the space tells whether the template trims it."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; templates read the first, gpt-oss the second."""

Message = Mapping[str, Any]


class ModelFolder(Protocol):
    """What a template needs to know of a loaded model (`hub.load.ModelInfo`)."""

    @property
    def folder(self) -> Path:
        """Folder of the tokenizer's files."""
        ...


class ChatTemplate:
    """The templates of a model: the usual one, and one for requests with tools where the folder
    has it."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        names: Mapping[str, str] | None = None,
        with_tools: str | None = None,
    ) -> None:
        """Args: source: Jinja. names: special tokens as templates call them, `bos_token` and so
        on. with_tools: the template for requests with tools. Raises UsageError for a template that
        is no Jinja, and where Jinja is missing."""
        self.source, self._tokenizer = source, tokenizer
        ends = {"eos_token": tokenizer.eos, "bos_token": tokenizer.bos}
        by_id = {i: name for name, i in tokenizer.special_tokens.items()}
        self._names = {name: by_id[i] for name, i in ends.items() if i in by_id}
        self._names |= names or {}
        self._shield = Shield(tokenizer.special_tokens)
        self._usual = compile_template(source)
        self._with_tools = compile_template(with_tools) if with_tools else self._usual

    @classmethod
    def load(cls, info: ModelFolder, tokenizer: Tokenizer, file: str = "") -> "ChatTemplate":
        """Return the template of `file`, or of the model's folder: chat_template.jinja, else
        `chat_template` in tokenizer_config.json (a text, or a list of named ones: `default`, and
        `tool_use` for requests with tools), else the plain `User: …`, a blank line, `Assistant:`.
        Raises UsageError for what cannot be read."""
        config = _json(info.folder / "tokenizer_config.json")
        names = _special_names({**_json(info.folder / "special_tokens_map.json"), **config})
        if file:
            return cls(_read(Path(file)), tokenizer, names)
        path = info.folder / "chat_template.jinja"
        source = _read(path) if path.is_file() else config.get("chat_template")
        match source:
            case None:
                return cls(PLAIN_TEMPLATE, tokenizer, names)
            case str():
                return cls(source, tokenizer, names)
            case [*entries] if all(isinstance(e, dict) for e in entries):
                templates = {entry.get("name"): entry.get("template") for entry in entries}
                usual = templates.get("default")
                if isinstance(usual, str):
                    return cls(usual, tokenizer, names, templates.get("tool_use"))
        raise UsageError(
            f"chat_template of {info.folder} is neither a text nor a list with one named default; "
            "give --chat-template FILE"
        )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation. A system message is rendered at its place.

        Args: messages: `role` and `content` (a text, or parts), and what else the template reads.
        tools: descriptions of functions. add_generation_prompt: open the assistant's message.
        continue_final_message: leave the last message open. kwargs: variables for the template.
        Raises: UsageError, one line, where the template refuses the conversation or fails."""
        if not messages:
            raise UsageError("messages is empty; give at least one message")
        conversation = [_plain(message) for message in self._shield.cover(list(messages))]
        if continue_final_message:
            _tag(conversation[-1])
        variables = {**self._names, **self._shield.cover(dict(kwargs or {}))}
        template = self._with_tools if tools else self._usual
        text = render(
            template,
            {
                **variables,
                "messages": conversation,
                "tools": self._shield.cover(list(tools)) if tools else None,
                "documents": variables.get("documents"),
                "add_generation_prompt": add_generation_prompt,
            },
        )
        if continue_final_message:
            text = _before_tag(text)
        return self._tokenizer.encode_parts(self._shield.parts(text))


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without empty entries, its reasoning under the names templates know."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _tag(message: dict[str, Any]) -> None:
    """Mark the end of the text that a reply is to continue, in place."""
    match message.get("content"):
        case str() as text:
            message["content"] = text + TAG
            return
        case list() as parts:
            for part in reversed(parts):
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    part["text"] += TAG
                    return
    raise UsageError("continue_final_message: the last message has no text to go on with")


def _before_tag(text: str) -> str:
    """Return a rendered conversation as far as the text that is to be continued."""
    end = text.rfind(TAG.strip())
    if end < 0:
        raise UsageError(
            "continue_final_message: the chat template leaves out the end of the last message"
        )
    trimmed = not text.startswith(TAG, end)
    return text[:end].rstrip() if trimmed else text[:end]


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return `bos_token` and so on from a tokenizer_config.json."""
    names = {}
    for key, value in config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            names[key] = value
    return names


def _read(path: Path) -> str:
    """Read the file of a template."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the chat template {path}: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    """Read a file of the folder; {} where there is none."""
    try:
        value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}; restore it or remove it") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is no JSON object; restore it or remove it")
    return value
