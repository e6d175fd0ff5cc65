"""From the body of a request to prompts and parameters. Every field is honoured or refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn

from headway.config import UsageError
from headway.data.tokenizer import Tokenizer
from headway.serve.params import SamplingParams
from headway.server.bodies import Bodies, Bounds, bodies
from headway.server.chat_template import ChatTemplate
from headway.server.conversation import call_schema, template_message, template_tool
from headway.server.errors import BadRequest
from headway.server.fields import Json
from headway.server.grammar import GrammarCompiler
from headway.server.json_body import read_json


@dataclass(frozen=True)
class Call:
    """A request for text, ready for the engine."""

    prompts: list[list[int]]
    """Token ids of each prompt."""
    texts: list[str]
    """The prompts as text, where `echo` returns them."""
    params: SamplingParams
    """Of every prompt; its `n` is `best_of`."""
    n: int
    """Choices of each prompt to return: the best of `params.n`."""
    chat: bool
    logprobs: bool = False
    """Whether the reply has them; `best_of` needs them too."""
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    return_experts: bool = False
    return_gates: bool = False
    salt: str = ""
    tools: str = ""
    """How the text becomes tool calls: "" (not), `auto`, `required` or `named`."""
    labels: dict[str, Json] = field(default_factory=dict)
    """What is sent back as it came."""


@dataclass(frozen=True)
class Protocol:
    """Reads bodies for one served model."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate
    compiler: GrammarCompiler
    bounds: Bounds
    routes: bool
    """Whether the engine keeps the chosen experts."""

    @cached_property
    def bodies(self) -> Bodies:
        """Return the fields of every body."""
        return bodies(self.bounds)

    def completion(self, body: bytes) -> Call:
        """Return the call of a body of /v1/completions. Raises BadRequest."""
        values = self.bodies.completion.read(read_json(body), "")
        self._check_model(values["model"])
        prompts = _several(values["prompt"])
        special = values["add_special_tokens"] is not False
        ids = [self._ids(p, special) if isinstance(p, str) else p or self._start for p in prompts]
        n, best_of = values["n"], values["best_of"] or values["n"]
        if best_of < n:
            _contradiction("best_of", f"best_of={best_of} is below n={n}; raise it to {n}")
        if best_of > n and values["stream"]:
            _contradiction("best_of", f"best_of={best_of} with stream: use n, or stream=false")
        if values["max_tokens"] == 0 and not (values["echo"] and best_of == 1):
            why = "max_tokens=0 writes nothing; with echo=true and n=1 it scores the prompt"
            _contradiction("max_tokens", why)
        logprobs = -1 if values["logprobs"] is None else values["logprobs"]
        more = {"n": best_of, "prompt_logprobs": logprobs if values["echo"] else -1}
        # which choice is best follows from log-probabilities
        more["logprobs"] = max(logprobs, 0) if best_of > n else logprobs
        call = self._call(values, ids, 16, values["max_tokens"], more)
        texts = [
            p if isinstance(p, str) else self.tokenizer.decode(p, values["skip_special_tokens"])
            for p in (call.prompts if values["truncate_prompt_tokens"] else prompts)
        ]
        echo = values["echo"]
        texts = texts if echo else []
        return replace(call, n=n, logprobs=logprobs >= 0, echo=echo, texts=texts)

    def chat(self, body: bytes) -> Call:
        """Return the call of a body of /v1/chat/completions. Raises BadRequest."""
        values = self.bodies.chat.read(read_json(body), "")
        self._check_model(values["model"])
        if values["top_logprobs"] is not None and not values["logprobs"]:
            _contradiction("top_logprobs", "top_logprobs without logprobs; set logprobs=true")
        short, long = values["max_tokens"], values["max_completion_tokens"]
        if short is not None and long is not None and short != long:
            _contradiction(
                "max_tokens", f"max_tokens={short} and max_completion_tokens={long}: give one"
            )
        if short == 0:
            _contradiction("max_tokens", "max_tokens=0 writes nothing; use 1 or more")
        tools = self._tool_choice(values)
        ids = self._render(values)
        if values["add_special_tokens"]:
            ids = self._after_bos(ids)
        more: dict[str, Any] = {"n": values["n"]}
        if values["logprobs"]:
            more["logprobs"] = values["top_logprobs"] or 0
        if tools in ("required", "named"):
            more["grammar"] = self._grammar("tools", call_schema(values))
        asked = long if short is None else short
        call = self._call(values, [ids], self.bounds.max_tokens, asked, more)
        return replace(call, chat=True, logprobs=values["logprobs"], tools=tools)

    def tokenize(self, body: bytes) -> tuple[list[int], bool]:
        """Return the ids of a body of /tokenize, and whether their texts are wanted."""
        values = self.bodies.tokenize.read(read_json(body), "")
        self._check_model(values["model"])
        if (values["prompt"] is None) == (values["messages"] is None):
            _contradiction("prompt", "give either prompt or messages")
        if values["messages"] is None:
            for name in ("tools", "add_generation_prompt"):
                if values[name] is not None:
                    _contradiction(name, f"{name} goes with messages, not with prompt")
            special = values["add_special_tokens"] is not False
            ids = self._encoded(values["prompt"], special)
        else:
            ids = self._render(values)
        return ids, values["return_token_strs"]

    def detokenize(self, body: bytes) -> str:
        """Return the text of a body of /detokenize."""
        values = self.bodies.detokenize.read(read_json(body), "")
        self._check_model(values["model"])
        return self.tokenizer.decode(values["tokens"], skip_special_tokens=False)

    # ---- parts --------------------------------------------------------------------------------

    @property
    def _start(self) -> list[int]:
        """Return the prompt that starts a document."""
        return [self.tokenizer.eos if self.tokenizer.bos is None else self.tokenizer.bos]

    def _encoded(self, text: str, special: bool) -> list[int]:
        ids = [int(i) for i in self.tokenizer.encode(text)]
        return self._after_bos(ids) if special else ids

    def _after_bos(self, ids: list[int]) -> list[int]:
        """Return ids that start with the beginning of text, once, if the tokenizer adds one."""
        bos = self.tokenizer.bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _ids(self, text: str, special: bool) -> list[int]:
        return self._encoded(text, special) or self._start

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            why = f"there is no model {name!r} here; use {self.name!r}"
            raise BadRequest(why, "model", 404, "model_not_found")

    def _call(
        self,
        values: dict[str, Any],
        prompts: list[list[int]],
        default: int,
        asked: int | None,
        more: dict[str, Any],
    ) -> Call:
        """Return the call of the fields that completions and chat share. `asked` is max_tokens;
        without it the reply takes at most `default` tokens, or what the context still holds."""
        if values["stream_options"] is not None and not values["stream"]:
            _contradiction("stream_options", "stream_options without stream; set stream=true")
        experts, gates = values["return_routed_experts"], values["return_expert_gates"]
        if (experts or gates) and not self.routes:
            why = "this server keeps no routes; start it with --return-routes"
            name = "return_routed_experts" if experts else "return_expert_gates"
            raise BadRequest(why, name, code="unsupported_parameter")
        max_len, needed = self.bounds.max_len, 1 if asked is None else asked
        if (keep := values["truncate_prompt_tokens"]) is not None:
            keep = max_len - needed if keep == -1 else keep
            prompts = [ids[-keep:] if keep else self._start for ids in prompts]
        longest = max(map(len, prompts))
        if longest + min(needed, 1) > max_len:
            why = f"the prompt has {longest} tokens and the context holds {max_len}"
            fix = "shorten it, or keep its end by truncate_prompt_tokens=-1"
            raise BadRequest(f"{why}; {fix}", "prompt", code="context_length_exceeded")
        if longest + needed > max_len:
            why = f"the prompt has {longest} tokens, max_tokens is {asked}"
            fix = f"the context holds {max_len}; use max_tokens={max_len - longest} or less"
            raise BadRequest(f"{why}, {fix}", "max_tokens", code="context_length_exceeded")
        max_tokens = min(default, max_len - longest) if asked is None else asked
        shape = values["response_format"] or {"type": "text"}
        if shape["type"] != "text" and "grammar" in more:
            _contradiction("response_format", "a forced tool call has a form; leave one out")
        if (grammar := self._format(shape)) is not None:
            more["grammar"] = grammar
        stop = values["stop"]
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=values["min_tokens"],
            temperature=values["temperature"],
            top_k=max(values["top_k"], 0),
            top_p=values["top_p"],
            min_p=values["min_p"],
            seed=values["seed"],
            repetition_penalty=values["repetition_penalty"],
            presence_penalty=values["presence_penalty"],
            frequency_penalty=values["frequency_penalty"],
            logit_bias=tuple((self._id(i), bias) for i, bias in values["logit_bias"].items()),
            allowed_token_ids=tuple(values["allowed_token_ids"] or ()),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(values["stop_token_ids"]),
            include_stop=values["include_stop_str_in_output"],
            ignore_eos=values["ignore_eos"],
            skip_special_tokens=values["skip_special_tokens"],
            return_routes=experts or gates,
            **more,
        )
        params.check(self.bounds.vocab_size, max_len, longest)
        labels = {k: values[k] for k in ("user", "metadata") if values[k] is not None}
        if values["store"] is not None:
            labels["store"] = False
        return Call(
            prompts,
            [],
            params,
            params.n,
            chat=False,
            stream=values["stream"],
            include_usage=(values["stream_options"] or {}).get("include_usage", False),
            return_token_ids=values["return_token_ids"],
            return_experts=experts,
            return_gates=gates,
            salt=values["cache_salt"],
            labels=labels,
        )

    def _id(self, name: str) -> int:
        """Return the token that a name in `logit_bias` gives."""
        if not (name.isascii() and name.isdecimal() and len(name) < 20):
            raise BadRequest(f"logit_bias has the name {name[:40]!r}; use token ids", "logit_bias")
        if int(name) >= self.bounds.vocab_size:
            last = self.bounds.vocab_size - 1
            raise BadRequest(f"logit_bias has token {name}; ids are 0 to {last}", "logit_bias")
        return int(name)

    def _render(self, values: dict[str, Any]) -> list[int]:
        """Return the ids of a conversation."""
        unfinished, opening = values["continue_final_message"], values["add_generation_prompt"]
        if unfinished and opening:
            _contradiction(
                "add_generation_prompt",
                "continue_final_message goes on with the last message and add_generation_prompt "
                "opens another; set one",
            )
        messages = [template_message(m, f"messages[{i}]") for i, m in enumerate(values["messages"])]
        if "developer" not in self.template.source:  # OpenAI's newer name for it
            messages = [
                {**m, "role": "system"} if m["role"] == "developer" else m for m in messages
            ]
        if unfinished and not messages[-1]["content"]:
            _contradiction("continue_final_message", "the last message has no text to go on with")
        tools = values["tools"] if values.get("tool_choice") != "none" else None
        try:
            return self.template.render(
                messages,
                [template_tool(tool) for tool in tools] if tools else None,
                add_generation_prompt=not unfinished if opening is None else opening,
                continue_final_message=unfinished,
                kwargs=values["chat_template_kwargs"],
            )
        except UsageError as error:
            raise BadRequest(str(error), "messages") from None

    def _tool_choice(self, values: dict[str, Any]) -> str:
        """Return how the reply becomes tool calls."""
        choice, tools = values["tool_choice"], values["tools"]
        if choice in (None, "none", "auto"):
            return "auto" if tools and choice != "none" else ""
        if not tools:
            _contradiction("tool_choice", "tool_choice without tools; give the functions")
        if choice == "required":
            return "required"
        names = [tool["function"]["name"] for tool in tools]
        if choice["function"]["name"] not in names:
            why = f"tool_choice names {choice['function']['name']!r}; tools has {', '.join(names)}"
            _contradiction("tool_choice", why)
        return "named"

    def _format(self, shape: dict[str, Any]) -> Any:
        """Return the grammar of a `response_format`, None for text."""
        kind = shape["type"]
        for name in ("json_schema", "regex"):
            given = shape.get(name) is not None
            if given != (kind == name):
                why = f"response_format has type {kind} and {'a' if given else 'no'} {name}"
                _contradiction(f"response_format.{name}", why)
        match kind:
            case "json_object":
                return self._grammar("json_object", None)
            case "json_schema":
                return self._grammar("json_schema", shape["json_schema"]["schema"])
            case "regex":
                return self._grammar("regex", shape["regex"])
            case _:
                return None

    def _grammar(self, kind: str, value: Json) -> Any:
        try:
            match kind:
                case "json_object":
                    return self.compiler.json_object()
                case "regex":
                    return self.compiler.regex(value)
                case _:
                    return self.compiler.json_schema(value)
        except UsageError as error:
            param = "tools" if kind == "tools" else "response_format"
            raise BadRequest(str(error), param) from None


def _several(prompt: str | list[Any]) -> Sequence[str | list[int]]:
    """Return the prompts of the field `prompt`."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    return [prompt]


def _contradiction(param: str, message: str) -> NoReturn:
    raise BadRequest(message, param, code="contradictory_fields")
