"""The fields of every request body, those of OpenAI and those named as in vLLM: one table is what
is read, what /openapi.json describes and what docs/serving.md lists."""

from typing import NamedTuple

from headway.server.fields import (
    MAX_INT,
    Choice,
    Either,
    Field,
    Flag,
    Free,
    Integer,
    Many,
    Number,
    Record,
    Table,
    Text,
)

MAX_TEXT = 2**26
"""Characters; the size of the body is the limit that counts."""
MAX_LOGPROBS = 20


class Bounds(NamedTuple):
    """Limits of one server, from its model and its flags."""

    vocab_size: int
    """Ids of the tokenizer."""
    max_len: int
    """Tokens of the context: prompt and reply."""
    max_tokens: int
    """Most tokens of a reply."""
    max_n: int
    """Most replies to one prompt, and prompts in one body."""


class Bodies(NamedTuple):
    """The body of each endpoint."""

    completion: Record
    chat: Record
    tokenize: Record
    detokenize: Record


def bodies(bounds: Bounds) -> Bodies:
    """Return what a server with these bounds takes."""
    shared = _shared(bounds)
    token = Integer(0, bounds.vocab_size - 1)
    tokens, text = Many(token, MAX_TEXT), Text(MAX_TEXT)
    several = (Many(text, bounds.max_n, 1), Many(tokens, bounds.max_n, 1))
    model, special = shared["model"], shared["add_special_tokens"]
    completion = {
        "prompt": Field(
            Either((text, tokens, *several)),
            "Text, token ids, or a list of either; an empty one starts a document.",
            needed=True,
        ),
        **shared,
        "best_of": Field(
            Integer(1, bounds.max_n),
            "Write so many and return the n with the highest mean log-probability.",
        ),
        "echo": Field(Flag(), "Return the prompt too, with logprobs its own.", False),
        "logprobs": Field(
            Integer(0, MAX_LOGPROBS), "Log-probabilities of the tokens and of so many alternatives."
        ),
    }
    rendered = {
        "messages": Field(Many(MESSAGE, 4096, 1), "The conversation.", needed=True),
        "tools": Field(Many(_TOOL, 128, 1), "Functions that the model may call."),
        "add_generation_prompt": Field(Flag(), "End with the opening of the assistant's turn."),
        "continue_final_message": Field(Flag(), "Go on with the last message.", False),
        "chat_template_kwargs": Field(Free(), "Variables for the chat template.", {}),
    }
    chat = {
        **rendered,
        **shared,
        "max_completion_tokens": Field(
            Integer(1, bounds.max_tokens), "Most tokens of the reply; the same as max_tokens."
        ),
        "logprobs": Field(Flag(), "Return the log-probability of each token.", False),
        "top_logprobs": Field(Integer(0, MAX_LOGPROBS), "And of so many alternatives."),
        "tool_choice": Field(
            Either((Choice(("none", "auto", "required")), _NAMED_TOOL)),
            "auto: <tool_call> tags are parsed; required or a function: the reply is a call.",
        ),
    }
    tokenize = {
        "model": model,
        "prompt": Field(text, "Text; or messages."),
        **{k: Field(f.kind, f.help, f.default) for k, f in rendered.items()},
        "add_special_tokens": special,
        "return_token_strs": Field(Flag(), "Return the text of each token too.", False),
    }
    detokenize = {"model": model, "tokens": Field(tokens, "Token ids.", needed=True)}
    return Bodies(
        Record(completion, _UNSUPPORTED | {"messages": "use /v1/chat/completions"}),
        Record(chat, _UNSUPPORTED | _UNSUPPORTED_IN_CHAT),
        Record(tokenize, {}),
        Record(detokenize, {}),
    )


def _shared(bounds: Bounds) -> dict[str, Field]:
    """Return the fields that completions and chat share."""
    token = Integer(0, bounds.vocab_size - 1)
    stop = Text(1024, 1)
    penalty = Number(-2, 2)
    return {
        "model": Field(Text(256), "Name of the model, as in /v1/models."),
        "max_tokens": Field(
            Integer(0, bounds.max_tokens),
            "Most tokens of the reply. Absent: 16, in chat what the context holds; 0 with echo.",
        ),
        "min_tokens": Field(
            Integer(0, bounds.max_tokens), "No end before so many tokens.", default=0
        ),
        "temperature": Field(Number(0, 100), "Divides the logits; 0 is greedy.", 1.0),
        "top_p": Field(
            Number(0, 1, above=True), "Draw from the fewest tokens of this probability.", 1.0
        ),
        "top_k": Field(Integer(-1, 2**31), "Draw from the k most likely; 0 or −1: all.", 0),
        "min_p": Field(Number(0, 1), "Drop tokens below this share of the most likely one's.", 0.0),
        "seed": Field(
            Integer(-MAX_INT - 1, MAX_INT), "The same seed, the same reply, whatever shares a step."
        ),
        "n": Field(Integer(1, bounds.max_n), "Replies to each prompt.", 1),
        "stop": Field(
            Either((stop, Many(stop, 16))), "Texts that end the reply, which are not in it.", ()
        ),
        "stop_token_ids": Field(Many(token, 64), "Tokens that end the reply.", ()),
        "include_stop_str_in_output": Field(Flag(), "Keep the stop text or token.", False),
        "ignore_eos": Field(Flag(), "Go on past the end of the text.", False),
        "skip_special_tokens": Field(Flag(), "Leave special tokens out of the text.", True),
        "presence_penalty": Field(penalty, "Taken from logits of tokens that were written.", 0.0),
        "frequency_penalty": Field(penalty, "The same, times how often they were.", 0.0),
        "repetition_penalty": Field(
            Number(0.01, 100), "Divides positive logits of tokens seen (CTRL).", 1.0
        ),
        "logit_bias": Field(
            Table("^[0-9]+$", Number(-100, 100), 1024), "Token id → what is added to its logit.", {}
        ),
        "allowed_token_ids": Field(Many(token, MAX_TEXT, 1), "Draw from these alone."),
        "response_format": Field(_FORMAT, "Constrain the reply to JSON, a schema or a regex."),
        "stream": Field(Flag(), "Send the reply as it is written.", False),
        "stream_options": Field(_STREAM_OPTIONS, "Only with stream."),
        "add_special_tokens": Field(
            Flag(), "Start with the tokenizer's BOS, if it adds one. In chat the template does."
        ),
        "truncate_prompt_tokens": Field(
            Integer(-1, 2**31), "Keep the last so many tokens of the prompt; −1: what fits."
        ),
        "cache_salt": Field(Text(256, 1), "Share cached prefixes only with the same salt.", ""),
        "return_token_ids": Field(Flag(), "Return the ids of prompt and reply.", False),
        "return_routed_experts": Field(
            Flag(),
            "Return the chosen experts, base64 of int16 [tokens, sparse layers, H·K].",
            False,
        ),
        "return_expert_gates": Field(
            Flag(), "Return their gates, base64 of float32 of the same shape (not in vLLM).", False
        ),
        "user": Field(Text(512), "Sent back with the reply."),
        "metadata": Field(Table("", Text(512), 16), "Sent back with the reply."),
        "store": Field(Flag(), "Sent back as false: this server stores nothing."),
    }


_NAME = Text(64, 1)
_FUNCTION = {"type": Field(Choice(("function",)), "function.", needed=True)}
_NAMED = Record({"name": Field(_NAME, "Its name.", needed=True)}, {})
_NAMED_TOOL = Record({**_FUNCTION, "function": Field(_NAMED, "Which.", needed=True)}, {})
_TOOL = Record(
    {
        **_FUNCTION,
        "function": Field(
            Record(
                {
                    "name": Field(_NAME, "Its name.", needed=True),
                    "description": Field(Text(MAX_TEXT), "What it does."),
                    "parameters": Field(Free(), "JSON Schema of its arguments."),
                    "strict": Field(Flag(), "Arguments of a forced call always fit the schema."),
                },
                {},
            ),
            "The function.",
            needed=True,
        ),
    },
    {},
)
_CALL = Record(
    {
        "id": Field(Text(256), "Its id."),
        **_FUNCTION,
        "function": Field(
            Record(
                {
                    "name": Field(_NAME, "Its name.", needed=True),
                    "arguments": Field(Text(MAX_TEXT), "A JSON object, as text.", needed=True),
                },
                {},
            ),
            "The function.",
            needed=True,
        ),
    },
    {"index": "it belongs to a streamed reply; leave it out"},
)
_MEDIA = "this server reads text alone"
_PART = Record(
    {
        "type": Field(Choice(("text",)), "text.", needed=True),
        "text": Field(Text(MAX_TEXT), "The text.", needed=True),
    },
    dict.fromkeys(("image_url", "input_audio", "file", "video_url", "audio_url"), _MEDIA),
)
MESSAGE = Record(
    {
        "role": Field(
            Choice(("system", "developer", "user", "assistant", "tool")), "Whose turn.", needed=True
        ),
        "content": Field(Either((Text(MAX_TEXT), Many(_PART, 4096, 1))), "Text, or parts of text."),
        "name": Field(Text(256), "For the chat template."),
        "reasoning_content": Field(Text(MAX_TEXT), "What the assistant thought before it spoke."),
        "tool_calls": Field(Many(_CALL, 128), "Calls of the assistant."),
        "tool_call_id": Field(Text(256), "Which call a tool answers."),
    },
    dict.fromkeys(("audio", "refusal", "annotations", "function_call"), _MEDIA),
)
_STREAM_OPTIONS = Record(
    {"include_usage": Field(Flag(), "End with an event that counts the tokens.", False)},
    {"continuous_usage_stats": "usage comes once, at the end"},
)
_FORMAT = Record(
    {
        "type": Field(
            Choice(("text", "json_object", "json_schema", "regex")), "What it is.", needed=True
        ),
        "json_schema": Field(
            Record(
                {
                    "name": Field(_NAME, "Its name."),
                    "description": Field(Text(MAX_TEXT), "What it is for."),
                    "schema": Field(Free(), "The JSON Schema.", needed=True),
                    "strict": Field(Flag(), "The reply always fits the schema."),
                },
                {},
            ),
            "With type json_schema.",
        ),
        "regex": Field(Text(65536, 1), "With type regex: what the whole reply matches."),
    },
    {},
)
_TEMPLATE = "a chat template comes from the model's folder or --chat-template, not from a request"
_GUIDED = "use response_format"
_UNSUPPORTED = {
    "suffix": "no model here is trained to fill in; put it into the prompt",
    "use_beam_search": "there is no beam search; use best_of",
    "length_penalty": "there is no beam search; use best_of",
    "early_stopping": "there is no beam search; use best_of",
    "chat_template": _TEMPLATE,
    "prompt_logprobs": "use echo with logprobs on /v1/completions",
    "return_tokens_as_token_ids": "use return_token_ids",
    "logits_processors": "requests carry no code; use logit_bias or allowed_token_ids",
    "bad_words": "use logit_bias",
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "structured_outputs": _GUIDED,
    "grammar": _GUIDED,
    "json_schema": _GUIDED,
    "prompt_embeds": "give text or token ids",
    "priority": "requests are served in the order in which they come",
    "service_tier": "there is one",
}
"""Field of the APIs around → what to do instead."""
_UNSUPPORTED_IN_CHAT = {
    "prompt": "use /v1/completions, or messages",
    "echo": "use /v1/completions",
    "best_of": "use n, or /v1/completions",
    "modalities": _MEDIA,
    "audio": _MEDIA,
    "web_search_options": "this server asks no other",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "parallel_tool_calls": "auto may give several calls, required and a named function give one",
    "prediction": "there is no speculation from a text of the client",
    "reasoning_effort": "use chat_template_kwargs",
    "verbosity": "use max_tokens",
    "documents": "put them into a message",
}
