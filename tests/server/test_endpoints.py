"""Every endpoint, by the `openai` client and by hand, on a real server."""

import json
import threading

import httpx
import numpy as np
import openai
import pytest
import torch

from headway import __version__
from headway.hub.load import load_model
from tests.server.served import CONTEXT

PROMPT = "def x ( y ) return "


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(server):
    return server.ready["model"]


@pytest.fixture(scope="module")
def log_probs(run):
    """`f(ids)` → log-probabilities [tokens, vocabulary] of one forward pass of the model."""
    loaded = load_model(run, "cpu", "float32")

    def log_probs(ids):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids])).logits_BSV[0].float()
        return torch.log_softmax(logits[:, : loaded.tokenizer.vocab_size], -1)

    return log_probs


def test_the_ready_line(server):
    assert server.ready["event"] == "ready" and server.ready["url"].startswith("http://127.0.0.1:")
    assert server.ready["dtype"] == "float32" and server.ready["batch_invariant"] is True
    assert server.ready["cache_tokens"] >= CONTEXT


def test_models_health_and_version(client, server, model):
    assert [m.id for m in client.models.list()] == [model] == [client.models.retrieve(model).id]
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/version").json() == {"version": __version__}
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_a_greedy_completion_is_that_of_the_model(client, model, log_probs):
    reply = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=8)
    ids = list(PROMPT.encode())
    for _ in range(8):
        ids.append(int(log_probs(ids)[-1].argmax()))
    choice = reply.choices[0]
    assert choice.text == bytes(ids[-8:]).decode() and choice.finish_reason == "length"
    assert reply.usage.prompt_tokens == len(PROMPT) and reply.usage.completion_tokens == 8
    assert reply.system_fingerprint.startswith("fp_") and reply.id.startswith("cmpl-")


def test_prompts_of_every_form_give_the_same(server):
    ids = list(PROMPT.encode())
    forms = [PROMPT, ids, [PROMPT], [ids]]
    texts = {server.complete(prompt=p, seed=7, max_tokens=6)["choices"][0]["text"] for p in forms}
    assert len(texts) == 1
    both = server.complete(prompt=[PROMPT, PROMPT], seed=7, max_tokens=6, n=2)["choices"]
    assert [c["index"] for c in both] == [0, 1, 2, 3]
    assert both[0]["text"] == both[2]["text"] == texts.pop() and both[1]["text"] == both[3]["text"]


def test_an_empty_prompt_starts_a_document(server):
    reply = server.complete(prompt="", max_tokens=2, return_token_ids=True)
    assert reply["choices"][0]["prompt_token_ids"] == [256] and reply["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize("cached", [False, True])
def test_scores_of_a_prompt_are_those_of_the_model(server, log_probs, cached):
    """lm-evaluation-harness reads it so: max_tokens 1, the slice without the last token."""
    text = (PROMPT * 3)[: 48 + cached]
    for _ in range(1 + cached):
        reply = server.complete(
            prompt=[list(text.encode())], echo=True, logprobs=1, max_tokens=1, temperature=0
        )
    scores = reply["choices"][0]["logprobs"]
    expected = log_probs(list(text.encode()))
    assert len(scores["token_logprobs"]) == len(text) + 1
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    for i, byte in enumerate(text.encode()[1:], start=1):
        assert scores["token_logprobs"][i] == pytest.approx(float(expected[i - 1, byte]), abs=1e-5)
        top = scores["top_logprobs"][i]
        assert max(top.values()) == pytest.approx(float(expected[i - 1].max()), abs=1e-5)
        greedy = int(expected[i - 1].argmax()) == byte
        assert greedy == (scores["token_logprobs"][i] == max(top.values()))
    assert "".join(scores["tokens"][:-1]) == text
    assert scores["text_offset"] == list(range(len(text) + 1))
    assert reply["choices"][0]["text"][: len(text)] == text


def test_max_tokens_0_scores_alone(server):
    one = server.complete(prompt=PROMPT, echo=True, logprobs=0, max_tokens=1)["choices"][0]
    none = server.complete(prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)
    choice = none["choices"][0]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == one["logprobs"]["token_logprobs"][:-1]
    assert none["usage"]["completion_tokens"] == 0


def test_log_probabilities_of_both_dialects(client, model, log_probs):
    ask = {"model": model, "temperature": 0, "max_tokens": 4}
    reply = client.completions.create(prompt=PROMPT, logprobs=3, **ask).choices[0]
    scores = log_probs(list(PROMPT.encode()))[-1]
    assert reply.logprobs.token_logprobs[0] == pytest.approx(float(scores.max()), abs=1e-5)
    assert [len(top) for top in reply.logprobs.top_logprobs] == [3] * 4
    assert reply.logprobs.text_offset == [0, 1, 2, 3]
    messages = [{"role": "user", "content": "x"}]
    reply = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **ask)
    for token in reply.choices[0].logprobs.content:
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 2 and len(token.bytes) <= 1
    text = b"".join(bytes(t.bytes) for t in reply.choices[0].logprobs.content)
    assert text.decode("utf-8", "replace") == reply.choices[0].message.content


def joined(events, field):
    return "".join(e["choices"][0].get(field) or "" for e in events if e["choices"])


def test_a_stream_says_what_the_whole_reply_says(server):
    body = {"prompt": PROMPT, "seed": 3, "max_tokens": 12, "logprobs": 2, "echo": True}
    whole = server.complete(**body)
    events = server.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert joined(events, "text") == whole["choices"][0]["text"]
    assert events[-1]["choices"] == [] and events[-1]["usage"].keys() == whole["usage"].keys()
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(e["usage"] is None for e in events[:-1]) and len({e["id"] for e in events}) == 1
    parts = [e["choices"][0]["logprobs"] for e in events[:-1] if e["choices"][0]["logprobs"]]
    for name, values in whole["choices"][0]["logprobs"].items():
        assert [v for part in parts for v in part[name]] == values, name
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]][-1] == whole["choices"][0][
        "finish_reason"
    ]


def test_a_chat_streams(client, model, server):
    messages = [
        {"role": "system", "content": "def"},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    ask = {"model": model, "messages": messages, "seed": 1, "max_completion_tokens": 9}
    whole = client.chat.completions.create(**ask)
    stream = list(
        client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask)
    )
    text = "".join(e.choices[0].delta.content or "" for e in stream if e.choices)
    assert (
        text == whole.choices[0].message.content and stream[0].choices[0].delta.role == "assistant"
    )
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert stream[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_n_choices_stream_under_their_indices(server):
    body = {"prompt": [PROMPT, "x"], "seed": 3, "max_tokens": 5, "n": 3}
    whole = server.complete(**body)
    texts = dict.fromkeys(range(6), "")
    for event in server.events("/v1/completions", body):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {c["index"]: c["text"] for c in whole["choices"]}
    assert len(set(list(texts.values())[:3])) > 1  # choices draw for themselves


def test_the_best_of_several_has_the_highest_mean(server):
    ask = {"prompt": PROMPT, "seed": 5, "max_tokens": 6}
    every = server.complete(**ask, n=4, logprobs=0)["choices"]
    best = max(every, key=lambda c: np.mean(c["logprobs"]["token_logprobs"]))
    reply = server.complete(**ask, best_of=4)
    assert [c["text"] for c in reply["choices"]] == [best["text"]]
    assert reply["choices"][0]["logprobs"] is None and reply["usage"]["completion_tokens"] == 24


def test_stop_texts_end_a_reply_and_are_cut_off(server):
    ask = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    text = server.complete(**ask)["choices"][0]["text"]
    stop = text[4:6]
    end = text.index(stop)
    for value in (stop, [stop, "never"]):
        choice = server.complete(**ask, stop=value)["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
            text[:end],
            "stop",
            stop,
        )
        assert (
            joined(server.events("/v1/completions", {**ask, "stop": value}), "text") == text[:end]
        )
    choice = server.complete(**ask, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert choice["text"] == text[:end] + stop
    token = ord(text[3])
    choice = server.complete(**ask, stop_token_ids=[token])["choices"][0]
    assert choice["text"] == text[: text.index(text[3])] and choice["stop_reason"] == token


def test_bias_and_allowed_tokens_decide(server):
    ask = {"prompt": PROMPT, "temperature": 0, "max_tokens": 3}
    assert server.complete(**ask, logit_bias={"113": 100})["choices"][0]["text"] == "qqq"
    assert server.complete(**ask, allowed_token_ids=[122])["choices"][0]["text"] == "zzz"
    once = server.complete(
        **ask, allowed_token_ids=[121, 122], presence_penalty=2, frequency_penalty=2
    )
    assert set(once["choices"][0]["text"]) == {"y", "z"}


def test_a_prompt_is_cut_at_its_start(server):
    long = "a" * (2 * CONTEXT) + PROMPT
    ask = {"max_tokens": 4, "temperature": 0, "return_token_ids": True}
    kept = server.complete(prompt=long, truncate_prompt_tokens=len(PROMPT), **ask)
    assert kept["choices"][0]["prompt_token_ids"] == list(PROMPT.encode())
    assert kept["choices"][0]["text"] == server.complete(prompt=PROMPT, **ask)["choices"][0]["text"]
    fits = server.complete(prompt=long, truncate_prompt_tokens=-1, **ask)
    assert fits["usage"]["prompt_tokens"] == CONTEXT - 4


def test_a_second_time_the_prefix_is_cached_unless_the_salt_differs(server):
    def cached(**more):
        return server.complete(prompt="cache " * 20, max_tokens=1, **more)["usage"][
            "prompt_tokens_details"
        ]

    assert cached(cache_salt="a") == {"cached_tokens": 0}
    assert cached(cache_salt="a") == {"cached_tokens": 112}
    assert cached(cache_salt="b") == {"cached_tokens": 0}


def test_company_and_cache_do_not_change_a_bit(server):
    ask = {"prompt": PROMPT * 3, "max_tokens": 20, "seed": 9, "logprobs": 2, "ignore_eos": True}
    alone = server.complete(**ask, cache_salt="alone")["choices"][0]

    def other(i):
        httpx.post(
            f"{server.url}/v1/completions",
            json={**ask, "prompt": "y " * (5 * i), "seed": i},
            timeout=60,
        )

    threads = [threading.Thread(target=other, args=(i,)) for i in range(18)]
    for thread in threads:
        thread.start()
    beside = [server.complete(**ask, cache_salt="beside") for _ in range(2)]
    for thread in threads:
        thread.join()
    assert [b["choices"][0] for b in beside] == [alone, alone]
    cached = [b["usage"]["prompt_tokens_details"]["cached_tokens"] for b in beside]
    assert cached == [0, 48]


def test_labels_come_back_and_nothing_is_stored(server):
    reply = server.complete(prompt="x", max_tokens=1, user="me", metadata={"a": "b"}, store=True)
    assert (reply["user"], reply["metadata"], reply["store"]) == ("me", {"a": "b"}, False)


def test_tokens_and_back(server):
    text = "ü<|endoftext|>x"
    reply = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert reply["tokens"] == list(text.encode()) and reply["count"] == len(text.encode())
    assert reply["max_model_len"] == CONTEXT and reply["token_strs"][:2] == [
        "bytes:\\xc3",
        "bytes:\\xbc",
    ]
    assert server.post("/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "x"}]
    chat = server.post("/tokenize", {"messages": messages}).json()
    asked = server.chat(messages=messages, max_tokens=1)
    assert chat["count"] == asked["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics"])
def test_head_gives_the_headers_of_get(server, path):
    head, get = server.http.head(path), server.http.get(path)
    assert head.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert server.http.get("/version").status_code == 200  # on the same connection


def test_metrics_count(server):
    before = {n: server.metric(n) for n in ("prompt_tokens_total", "generation_tokens_total")}
    firsts = server.metric("time_to_first_token_seconds_count")
    server.complete(prompt=PROMPT, max_tokens=5, n=2, ignore_eos=True)
    assert server.metric("prompt_tokens_total") - before["prompt_tokens_total"] == len(PROMPT)
    assert server.metric("generation_tokens_total") - before["generation_tokens_total"] == 10
    assert server.metric("time_to_first_token_seconds_count") - firsts == 2
    assert server.metric("cache_blocks_used") == server.metric("requests_running") == 0
    assert server.metric("cache_blocks_total") * 16 == server.ready["cache_tokens"]
    assert server.metric("step_seconds_count") == server.metric("experts_touched_count") > 0


def test_every_reply_has_its_own_id(server):
    ids = {server.http.get("/health").headers["x-request-id"] for _ in range(3)}
    reply = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert len(ids) == 3 and reply.json()["id"] == f"cmpl-{reply.headers['x-request-id']}"


def test_prompts_are_never_logged(server):
    secret = "xyzzy-secret"
    server.complete(prompt=secret, max_tokens=1)
    server.post("/v1/completions", {"prompt": secret, "temperature": -1})
    server.http.get(f"/{secret}")
    assert secret not in server.log.read_text()


@pytest.mark.parametrize("kind", ["json_object", "json_schema", "regex"])
def test_a_reply_has_the_form_that_is_asked_for(client, model, kind):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    shape = {"type": kind}
    if kind == "json_schema":
        shape["json_schema"] = {"name": "s", "schema": schema, "strict": True}
    if kind == "regex":
        shape["regex"] = "[0-9]{3}"
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "x"}],
        response_format=shape,
        seed=0,
        max_tokens=60,
    )
    text = reply.choices[0].message.content
    if kind == "regex":
        assert len(text) == 3 and text.isdecimal()
    elif kind == "json_schema":
        assert json.loads(text)["a"] in (1, 2)
    elif reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert text.startswith("{")


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "choice, reason",
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "add"}}, "stop")],
)
def test_a_forced_call_is_a_call(client, model, choice, reason):
    ask = {
        "model": model,
        "messages": [{"role": "user", "content": "x"}],
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 100,
        "seed": 0,
    }
    reply = client.chat.completions.create(**ask).choices[0]
    call = reply.message.tool_calls[0]
    assert call.function.name == "add" and json.loads(call.function.arguments)["a"] in (1, 2)
    assert reply.finish_reason == reason and reply.message.content is None
    deltas = [e.choices[0].delta for e in client.chat.completions.create(stream=True, **ask)]
    streamed = [c for d in deltas for c in d.tool_calls or []]
    assert [(c.index, c.function.name) for c in streamed] == [(0, "add")]
