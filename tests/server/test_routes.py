"""The chosen experts and their gates in replies: those of one forward pass, as the tokens come."""

import base64

import numpy as np
import pytest
import torch

from headway.hub.load import load_model
from headway.model.context import Context

PROMPT = "def x ( y ) return "
ROUTES = (("routed_experts", np.int16), ("expert_gates", np.float32))


def decoded(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def test_routes_are_those_that_a_replay_takes(server, run):
    reply = server.complete(
        prompt=PROMPT,
        max_tokens=3,
        return_routed_experts=True,
        return_expert_gates=True,
        return_token_ids=True,
    )
    shape = (len(PROMPT) + 3 - 1, 2, 4)
    routes = decoded(reply["choices"][0]["routed_experts"], np.int16).reshape(shape)
    gates = decoded(reply["choices"][0]["expert_gates"], np.float32).reshape(shape)
    loaded = load_model(run, "cpu", "float32")
    ids = list(PROMPT.encode()) + reply["choices"][0]["token_ids"][:-1]
    with torch.no_grad():
        output = loaded.model(torch.tensor([ids]), ctx=Context(report=frozenset({"routes"})))
    expected = np.stack([r.index_THK.flatten(1).numpy() for r in output.routes], 1)
    assert (routes == expected).all()
    expected = np.stack([r.gate_THK.flatten(1).numpy() for r in output.routes], 1)
    assert gates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_has_the_routes_of_each_token_as_it_is_read(server, chat):
    ask = {"max_tokens": 6, "seed": 2, "ignore_eos": True}
    ask |= {"return_routed_experts": True, "return_expert_gates": True}
    if chat:
        path, ask = "/v1/chat/completions", {**ask, "messages": [{"role": "user", "content": "x"}]}
        whole = server.chat(**ask)
    else:
        path, ask = "/v1/completions", {**ask, "prompt": PROMPT, "n": 2, "stop": "zzzz"}
        whole = server.complete(**ask)
    parts: dict = {}
    for event in server.events(path, ask):
        for choice in event["choices"]:
            rows = [decoded(choice[name], kind) for name, kind in ROUTES]
            parts.setdefault(choice["index"], []).append(rows)
    for choice in whole["choices"]:
        rows = parts[choice["index"]]
        assert [len(experts) // 8 for experts, _ in rows] == [
            whole["usage"]["prompt_tokens"], *[1] * 5
        ]  # fmt: skip
        for (name, kind), pieces in zip(ROUTES, zip(*rows, strict=True), strict=True):
            assert (np.concatenate(pieces) == decoded(choice[name], kind)).all()


def test_only_what_was_asked_for_comes(server):
    reply = server.complete(prompt="x", max_tokens=2, return_expert_gates=True)["choices"][0]
    assert "expert_gates" in reply and "routed_experts" not in reply
    assert "expert_gates" not in server.complete(prompt="x", max_tokens=2)["choices"][0]


def test_the_shape_is_said(server):
    model = server.http.get("/v1/models").json()["data"][0]
    assert model["routes"] == {"layers": [0, 1], "heads": 2, "top_k": 2, "experts": 4}
