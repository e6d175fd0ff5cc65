"""A server whose model fails for one token: those requests end with 500, and it goes on."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.hub.export import export_hf
from headway.hub.trained import open_trained
from tests.server.served import Server

BAD = 255
"""A token whose embedding is NaN: a step with it gives no number."""
ASK = {"prompt": "def x ", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
SECRET = [*b"my secret words", BAD]


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The tiny run as a Hugging Face folder, one row of its embedding NaN."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    with open_trained(run) as source:
        export_hf(source, folder, "float32")
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    (name,) = (name for name in weights if "embed" in name)
    weights[name][BAD] = torch.nan
    save_file(weights, path, {"format": "pt"})
    return folder


@pytest.fixture
def server(folder, tmp_path):
    server = Server(folder, log=tmp_path / "log.txt")
    yield server
    server.kill()


def test_requests_of_a_failed_step_end_and_the_server_goes_on(server):
    expected = server.complete(**ASK)["choices"]
    for _ in range(4):  # more than may follow each other, each after a step that succeeded
        reply = server.post("/v1/completions", {**ASK, "prompt": SECRET})
        assert reply.status_code == 500
        assert reply.json()["error"] == {
            "message": "the engine failed in a step of this request",
            "type": "server_error",
            "param": None,
            "code": "engine_failed",
        }
        assert server.complete(**ASK)["choices"] == expected
    *_, last = server.events("/v1/completions", {**ASK, "prompt": SECRET})
    assert last["error"]["code"] == "engine_failed"
    # two prompts of one request: the one that could go on ends too
    both = server.post("/v1/completions", {**ASK, "prompt": ["good", SECRET], "max_tokens": 200})
    assert both.status_code == 400  # a list is of texts or of ids
    both = server.post("/v1/completions", {**ASK, "prompt": [[1, 2], SECRET], "max_tokens": 200})
    assert both.status_code == 500
    assert server.http.get("/health").status_code == 200
    assert server.metric("failed_total") == 4 + 1 + 2 and server.metric("failed_steps_total") == 6
    assert server.metric("cache_blocks_used") == server.metric("requests_running") == 0
    code, stopped = server.stop()
    assert (code, stopped["blocks_used"]) == (0, 0)
    lines = server.log.read_text().splitlines()
    assert len(lines) == 6 and "secret" not in server.log.read_text()
    assert lines[0] == (
        "headway: a step failed and ended 1 requests: RunError: "
        "the model's largest logit is nan; nothing can be drawn from it"
    )


def test_three_failures_one_after_another_end_it(server):
    server.complete(**ASK)
    for _ in range(3):
        assert server.post("/v1/completions", {**ASK, "prompt": SECRET}).status_code == 500
    deadline = time.monotonic() + 20
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.process.returncode == 1
    log = server.log.read_text()
    assert "the model's largest logit is nan" in log.splitlines()[-1]
    events = [json.loads(line)["event"] for line in server.process.stdout]
    assert "stopped" not in events
