"""`headway chat`: a conversation with a trained model in a terminal, or through a pipe."""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from headway.cli import trained
from headway.cli.options import parse, print_json
from headway.config import EngineConfig, UsageError

if TYPE_CHECKING:
    from headway.serve.engine import Engine
    from headway.serve.params import SamplingParams
    from headway.server.chat_template import ChatTemplate

COMMANDS = """\
/system TEXT   add a system message where the conversation stands
/reset         forget the conversation
/save FILE     write the messages as JSON
/seed N        draw the next replies with seed N
/help          show this; Ctrl-C stops a reply, Ctrl-D ends"""


@dataclass(frozen=True)
class Chat(trained.SamplingOptions):
    """A conversation: each line is a message, the reply is streamed. A line that starts with / is a
    command; /help lists them."""

    system: str = ""
    """A system message that the conversation starts with."""
    tokens: int = 512
    chat_template: str = ""
    """File of a Jinja template; empty: the model's own, or `User: … Assistant: …`."""


def chat(args: Sequence[str]) -> int:
    """Run `headway chat RUN` and return its exit code."""
    options = parse(Chat, args, "headway chat")

    from headway.hub.export_tokenizer import PLAIN_TEMPLATE
    from headway.serve.engine import Engine
    from headway.server.chat_template import ChatTemplate

    params = options.params()
    loaded = trained.load(options)
    info = loaded.info
    template = ChatTemplate.load(info, loaded.tokenizer, options.chat_template)
    if template.source == PLAIN_TEMPLATE:  # a base model writes the other side too
        params = replace(params, stop=("\n\nUser:",))
    engine = Engine.of(loaded, EngineConfig(max_requests=1, cache_tokens=2 * info.max_len))
    conversation = Conversation(engine, template, params)
    if options.system:
        conversation.add("system", options.system)
    for line in _lines():
        try:
            conversation.take(line)
        except UsageError as error:
            print(f"headway: {error}", file=sys.stderr)
    print_json(options.json, {**conversation.facts(), **trained.facts(loaded)})
    return 0


class Conversation:
    """The messages so far, and the engine that replies. What it has computed of them stays in its
    cache, so that a turn reads the new message alone."""

    def __init__(
        self, engine: "Engine", template: "ChatTemplate", params: "SamplingParams"
    ) -> None:
        self.messages: list[dict[str, str]] = []
        self._engine, self._template, self._params = engine, template, params
        self._n_stopped = 0

    def add(self, role: str, content: str) -> None:
        """Add a message at the end."""
        self.messages.append({"role": role, "content": content})

    def take(self, line: str) -> None:
        """Follow a command, or reply to a message. Raises UsageError, with the conversation as it
        was, for what cannot be."""
        command, _, value = line.strip().partition(" ")
        match command, value.strip():
            case "", _:
                pass
            case "/system", text if text:
                self.add("system", text)
            case "/reset", "":
                self.messages.clear()
            case "/save", name if name:
                self._save(Path(name))
            case "/seed", number if number.removeprefix("-").isdecimal():
                params = replace(self._params, seed=int(number))
                params.check_values()
                self._params = params
            case "/help", "":
                print(COMMANDS)
            case word, _ if word.startswith("/"):
                raise UsageError(f"{line.strip()[:80]!r} is no command; /help lists them")
            case _:
                self._reply(line.strip())

    def facts(self) -> dict[str, int]:
        """Return what the conversation cost, for `--json`."""
        counters = self._engine.counters
        return {
            "messages": len(self.messages),
            "prompt_tokens": counters.prompt_tokens,
            "cached_tokens": counters.cached_tokens,
            "generated_tokens": counters.generation_tokens,
            "stopped_replies": self._n_stopped,
        }

    def _reply(self, text: str) -> None:
        """Stream the reply to a message and add both. Ctrl-C ends it where it is."""
        engine = self._engine
        ids = self._template.render([*self.messages, {"role": "user", "content": text}])
        room = engine.max_len - len(ids)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(ids)} tokens and the context holds {engine.max_len}; "
                "/reset forgets it"
            )
        params = replace(self._params, max_tokens=min(self._params.max_tokens, room))
        request = engine.add(ids, params)
        texts = []
        with _ctrl_c() as pressed:
            while engine.has_work:
                if pressed.is_set():
                    engine.abort(request.id)
                    self._n_stopped += 1
                    break
                for update in engine.step():
                    texts.append(update.text)
                    print(update.text, end="", flush=True)
        print()
        self.add("user", text)
        self.add("assistant", "".join(texts).strip())

    def _save(self, path: Path) -> None:
        """Write the messages to a file that does not exist yet."""
        try:
            with path.expanduser().open("x", encoding="utf-8") as file:
                json.dump(self.messages, file, ensure_ascii=False, indent=2)
        except FileExistsError:
            raise UsageError(f"{path} exists; choose another file") from None
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _lines() -> Iterator[str]:
    """Yield the lines of stdin; in a terminal with a prompt and editing."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines and keeps a history)
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            return


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C, so that a pass of the engine is not cut in two; a second
    one before the end of that pass raises KeyboardInterrupt. Outside the main thread, where Python
    allows no handlers, nothing is changed."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def handle(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
