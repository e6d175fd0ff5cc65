"""Requests that are refused: a 4xx with one line in OpenAI's form, and the server stays up."""

import json

import pytest

from tests.server.served import CONTEXT

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def nested(depth):
    schema = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


def error(reply, status=400):
    assert reply.status_code == status, reply.text
    body = reply.json()["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert "\n" not in body["message"] and len(body["message"]) < 600
    return body


@pytest.fixture(autouse=True)
def up(server):
    yield
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "body, words",
    [
        ({}, "prompt is missing"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": {"a": 1}}, "prompt is an object"),
        ({"prompt": "x", "promt": 1}, "unknown field promt; did you mean prompt?"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": "x", "messages": HELLO}, "use /v1/chat/completions"),
        ({"prompt": "x", "guided_json": {}}, "use response_format"),
        ({"prompt": "x", "chat_template": "{{ 1 }}"}, "comes from the model's folder"),
        ({"prompt": [256, 257]}, "prompt[1] is 257; use a whole number from 0 to 256"),
        ({"prompt": [-1]}, "prompt[0] is -1"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": ["x"] * 65}, "use a list of 1 to 64"),
        ({"prompt": "x" * 300}, f"the prompt has 300 tokens and the context holds {CONTEXT}"),
        ({"prompt": "x" * 250, "max_tokens": 7}, "max_tokens is 7, the context holds 256; use max_tokens=6 or less"),
        ({"prompt": "x", "max_tokens": 257}, "max_tokens is 257; use a whole number from 0 to 256"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens is -1"),
        ({"prompt": "x", "max_tokens": 10**400}, "max_tokens is a number of 401 digits"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens is true"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens is '5'"),
        ({"prompt": "x", "max_tokens": 0}, "with echo=true and n=1 it scores"),
        ({"prompt": "x", "max_tokens": 0, "echo": True, "n": 2}, "with echo=true and n=1 it scores"),
        ({"prompt": "x", "min_tokens": 20}, "min_tokens=20 is above max_tokens=16"),
        ({"prompt": "x", "temperature": -0.1}, "temperature is -0.1; use a number from 0 to 100"),
        ({"prompt": "x", "temperature": 1e300}, "temperature is 1e+300"),
        ({"prompt": "x", "top_p": 0}, "top_p is 0; use a number above 0 to 1"),
        ({"prompt": "x", "repetition_penalty": 5e-324}, "repetition_penalty is 5e-324; use a number from 0.01 to 100"),
        ({"prompt": "x", "n": 65}, "n is 65; use a whole number from 1 to 64"),
        ({"prompt": "x", "n": 3, "best_of": 2}, "best_of=2 is below n=3; raise it to 3"),
        ({"prompt": "x", "best_of": 2, "stream": True}, "best_of=2 with stream"),
        ({"prompt": "x", "logprobs": 21}, "logprobs is 21; use a whole number from 0 to 20"),
        ({"prompt": "x", "stop": [str(i) for i in range(1000)]}, "stop is a list of 1000; use a list of 0 to 16"),
        ({"prompt": "x", "stop": ""}, "stop is ''"),
        ({"prompt": "x", "stop": [""]}, "stop[0] is ''"),
        ({"prompt": "x", "seed": 2**63}, "seed is 9223372036854775808"),
        ({"prompt": "x", "stream_options": {}}, "stream_options without stream; set stream=true"),
        ({"prompt": "x", "stream": True, "stream_options": {"usage": 1}}, "unknown field stream_options.usage"),
        ({"prompt": "x", "logit_bias": {"257": 1}}, "logit_bias has token 257; ids are 0 to 256"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias has the name 'a'"),
        ({"prompt": "x", "logit_bias": {"²": 1}}, "logit_bias has the name '²'"),
        ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias.1 is 101; use a number from -100 to 100"),
        ({"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids is an empty list"),
        ({"prompt": "x", "allowed_token_ids": [999]}, "allowed_token_ids[0] is 999"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt is ''"),
        ({"prompt": "x", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens is -2"),
        ({"prompt": "x", "user": 5}, "user is 5"),
        ({"prompt": "x", "metadata": {"a": 1}}, "metadata.a is 1"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, "has type json_schema and no json_schema"),
        ({"prompt": "x", "response_format": {"type": "text", "regex": "a"}}, "has type text and a regex"),
        ({"prompt": "x", "response_format": {"type": "regex", "regex": "(a"}}, "regex"),
        ({"prompt": "x", "response_format": {"type": "yaml"}}, "response_format.type is 'yaml'"),
        ({"prompt": "x", "response_format": nested(20), "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"prompt": "x", "response_format": nested(200)}, "the body nests deeper than 64"),
        (
            {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "objekt"}}}},
            "objekt",
        ),
    ],
)  # fmt: skip
def test_completions(server, body, words):
    assert words in error(server.post(COMPLETIONS, body))["message"]


@pytest.mark.parametrize(
    "body, words",
    [
        ({"messages": []}, "messages is an empty list; use a list of 1"),
        ({"messages": HELLO, "prompt": "x"}, "use /v1/completions, or messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "this server reads text alone"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}, "only assistant calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]}]}, "the arguments"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "only tool answers"),
        ({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6}, "give one"),
        ({"messages": HELLO, "max_tokens": 0}, "use 1 or more"),
        ({"messages": HELLO, "top_logprobs": 2}, "set logprobs=true"),
        ({"messages": HELLO, "logprobs": 2}, "logprobs is 2; use true or false"),
        ({"messages": HELLO, "audio": {}}, "audio is not supported"),
        ({"messages": HELLO, "functions": []}, "use tools"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice without tools"),
        ({"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice names 'sub'; tools has add"),
        ({"messages": HELLO, "tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "leave one out"),
        ({"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True}, "set one"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "tokens and the context holds 256"),
    ],
)  # fmt: skip
def test_chats(server, body, words):
    assert words in error(server.post(CHAT, body))["message"]


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"", "the body is no JSON"),
        (b"{", "the body is no JSON"),
        (b'{"prompt": "x"} x', "the body is no JSON: Extra data"),
        (b"[]", "the body is an empty list"),
        (b"null", "the body is null"),
        (b"\xff\xfe", "the body is no UTF-8: byte 0"),
        (b'{"prompt": "\xc3"}', "the body is no UTF-8"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "x", "temperature": 1e999}', "above 1.8e308"),
        (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "over 4300 digits"),
        (b'{"prompt": "x", "prompt": "y"}', "the field prompt is there twice"),
        (b"[" * 100_000, "nests deeper"),
        (b'{"a":' * 100_000, "nests deeper"),
        (b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", "nests deeper than 64"),
    ],
    ids=range(16),
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json_object(server, path, raw, words):
    reply = server.http.post(path, content=raw, headers={"content-type": "application/json"})
    assert words in error(reply)["message"]


def test_a_body_of_another_type(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = server.http.post(
            COMPLETIONS, content=b'{"prompt": "x"}', headers={"content-type": kind}
        )
        assert error(reply, 415)["code"] == "unsupported_media_type"


def test_a_body_that_is_too_large(server):
    reply = server.http.post(
        COMPLETIONS, content=b"x" * (4 * 2**20 + 1), headers={"content-type": "application/json"}
    )
    assert error(reply, 413)["code"] == "body_too_large"


def test_unknown_models_paths_and_methods(server):
    reply = error(server.post(COMPLETIONS, {"prompt": "x", "model": "gpt-4"}), 404)
    assert reply["code"] == "model_not_found" and server.ready["model"] in reply["message"]
    assert (
        "did you mean /v1/completions?" in error(server.post("/v1/completion", {}), 404)["message"]
    )
    assert error(server.http.get("/etc/passwd"), 404)["code"] == "not_found"
    assert error(server.http.get("/v1/models/../../x"), 404)
    reply = server.http.get(COMPLETIONS)
    assert error(reply, 405)["code"] == "method_not_allowed" and reply.headers["allow"] == "POST"
    assert error(server.http.put("/health"), 405)


def test_a_foreign_host(server):
    reply = server.http.get("/v1/models", headers={"host": "evil.example"})
    assert error(reply, 403)["code"] == "host_not_allowed"
    assert (
        "access-control-allow-origin"
        not in server.http.get("/health", headers={"origin": "http://evil.example"}).headers
    )


def test_the_openai_client_raises_what_the_server_says(server):
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=server.ready["model"], prompt="x", temperature=-1)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")


def test_tokenize(server):
    assert "either prompt or messages" in error(server.post("/tokenize", {}))["message"]
    assert (
        "goes with messages"
        in error(server.post("/tokenize", {"prompt": "x", "add_generation_prompt": True}))[
            "message"
        ]
    )
    assert "tokens[0] is 257" in error(server.post("/detokenize", {"tokens": [257]}))["message"]
    assert json.loads(server.post("/tokenize", {"prompt": ""}).text)["tokens"] == []
