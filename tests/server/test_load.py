"""What a server is made of: names, bounds, the digest of weights."""

import shutil

import pytest

from headway.config import ServerConfig, UsageError
from headway.hub.load import load_model
from headway.server.load import load_served, weights_digest
from tests.server.served import CONTEXT


@pytest.fixture(scope="module")
def loaded(run):
    return load_model(run, "cpu", "float32")


def test_the_name_and_the_bounds(loaded):
    served = load_served(loaded, ServerConfig(max_tokens=100, max_requests=2, max_waiting=3))
    bounds = served.protocol.bounds
    assert (served.protocol.name, bounds.max_len, bounds.max_tokens) == ("run", CONTEXT, 100)
    assert (
        served.max_choices == 5
        and load_served(loaded, ServerConfig(name="other")).protocol.name == "other"
    )


def test_a_cache_below_the_context_bounds_a_request(loaded):
    served = load_served(loaded, ServerConfig(cache_tokens=64))
    assert served.protocol.bounds.max_len == served.protocol.bounds.max_tokens == 64
    call = served.protocol.chat(b'{"messages": [{"role": "user", "content": "x"}]}')
    assert len(call.prompts[0]) + call.params.max_tokens == 64


def test_less_than_the_context_and_never_more(loaded):
    served = load_served(loaded, ServerConfig(max_len=64, max_requests=3))
    assert served.protocol.bounds.max_len == served.engine.max_len == 64
    assert served.engine.scheduler.n_pages == 3 * 64 // 16
    words = f"max_len={CONTEXT + 1} is above the context of run, {CONTEXT} tokens; use at most"
    with pytest.raises(UsageError, match=words):
        load_served(loaded, ServerConfig(max_len=CONTEXT + 1))


def test_a_template_that_is_none(loaded, tmp_path):
    (tmp_path / "t.jinja").write_text("{% if %}")
    with pytest.raises(UsageError, match="template"):
        load_served(loaded, ServerConfig(chat_template=str(tmp_path / "t.jinja")))


def test_the_fingerprint_follows_weights_and_dtype(loaded, run):
    one, again = load_served(loaded), load_served(loaded)
    other = load_served(load_model(run, "cpu", "bfloat16"))
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_folders_of_safetensors_are_told_apart(run, tmp_path):
    source = next((run / "checkpoints").glob("*/model.safetensors"))
    digests = set()
    for name, place in (("same", None), ("first", -1), ("middle", -source.stat().st_size // 3)):
        (tmp_path / name).mkdir()
        path = shutil.copy(source, tmp_path / name / "model.safetensors")
        if place is not None:
            with path.open("r+b") as file:
                file.seek(place, 2)
                byte = file.read(1)
                file.seek(place, 2)
                file.write(bytes([byte[0] ^ 1]))
        digests.add(weights_digest(tmp_path / name))
    assert len(digests) == 3
    assert weights_digest(tmp_path / "same") in digests
