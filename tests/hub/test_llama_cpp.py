"""llama.cpp computes from our GGUF files what we compute. By hand:

mkdir llama && cd llama && npm init -y
npm i -E --ignore-scripts node-llama-cpp@3.21.1 @node-llama-cpp/linux-x64@3.21.1 --omit=optional
HEADWAY_LLAMA_CPP=$PWD python -m pytest -m slow tests/hub/test_llama_cpp.py
"""

import json
import math
import os
import random
import shutil
import subprocess
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headway.data.tokenizer import ByteTokenizer, train_bpe
from headway.hub.gguf import export_gguf
from headway.hub.trained import open_trained
from tests.hub.small_runs import SMALL, write_run
from tests.hub.test_export_families import KNOWN
from tests.hub.test_gguf import LLAMA, OLMOE, QWEN2_MOE

NODE = os.environ.get("HEADWAY_LLAMA_CPP", "")
LLAMA3 = replace(SMALL.rope, scaling="llama3", factor=8.0, original_max_len=32)
LINEAR = replace(SMALL.rope, scaling="linear", factor=4.0)
MODELS = {
    **KNOWN,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "llama3": replace(LLAMA, rope=LLAMA3),
    "linear": replace(LLAMA, rope=LINEAR),
}
TEXT = "The cat, naïve 123:\n  def"
ASK = """
import fs from "fs";
import {getLlama} from "node-llama-cpp";
const [file, answer, ids, text, cache] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const kind = Number(cache);
const context = await model.createContext({contextSize: 64, threads: 1, flashAttention: kind > 0,
  experimentalKvCacheKeyType: kind, experimentalKvCacheValueType: kind});
const how = {temperature: 0, yieldEogToken: true};
const tokens = [], probabilities = [];
for await (const step of
    context.getSequence().evaluateWithMetadata(JSON.parse(ids), {probabilities: true}, how)) {
  tokens.push(step.token);
  probabilities.push([...step.probabilities]);
  if (tokens.length == 12) break;
}
const answers = {tokens, probabilities, ids: model.tokenize(text), eos: model.tokens.eos};
fs.writeFileSync(answer, JSON.stringify(answers));
process.exit(0);
"""


def ask(folder: Path, file: Path, ggml_type: int) -> dict:
    """What llama.cpp says of TEXT: 12 greedy tokens with the probabilities of all."""
    script = Path(NODE) / f"ask-{os.getpid()}.mjs"
    script.write_text(ASK)
    ids = json.dumps(ByteTokenizer().encode(TEXT).tolist())
    words = ["node", script, file, folder / "answer.json", ids, TEXT, str(ggml_type)]
    try:
        subprocess.run(words, cwd=NODE, check=True, capture_output=True, timeout=120)
    finally:
        script.unlink()
    return json.loads((folder / "answer.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not (NODE and shutil.which("node")), reason="needs HEADWAY_LLAMA_CPP and node")
@pytest.mark.parametrize("name", MODELS)
def test_the_same_probabilities_and_text(name, tmp_path):
    """With a float32 cache to 1e-4; with its own, which is float16, to 2e-2 for such wild weights."""
    model = write_run(tmp_path / "run", MODELS[name])
    with open_trained(tmp_path / "run") as source:
        export_gguf(source, tmp_path / "m.gguf", "float32")
    for ggml_type, bound in ((0, 1e-4), (1, 2e-2)):  # float32, float16
        there = ask(tmp_path, tmp_path / "m.gguf", ggml_type)
        ids = ByteTokenizer().encode(TEXT).tolist()
        assert there["ids"] == ids and there["eos"] == 256
        for token, probabilities in zip(there["tokens"], there["probabilities"], strict=True):
            with torch.no_grad():
                ours = model(torch.tensor([ids])).logits_BSV[0, -1, :257].log_softmax(-1)
            assert token == int(ours.argmax()) and len(probabilities) == 257
            likely = {t: math.log(p) for t, p in probabilities if p > 1e-9}
            assert max(abs(value - float(ours[t])) for t, value in likely.items()) < bound
            ids.append(token)


TOKENIZE = """
import fs from "fs";
import {getLlama} from "node-llama-cpp";
const [file, texts, answer] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file, vocabOnly: true});
const ids = JSON.parse(fs.readFileSync(texts)).map((text) => model.tokenize(text));
fs.writeFileSync(answer, JSON.stringify(ids));
process.exit(0);
"""
PHRASES = (
    "it's IT'S we'LL I'd you'Re 'tis",
    "1234567 ١٢٣ ½ Ⅷ 十二 3.14e-10",
    "tabs\t\tand\r\nnewlines\n\n\n  x   \n",
    "non-breaking\u00a0and\u3000wide\u2003spaces",
    "naïve café, 👩\u200d👩\u200d👧 🏳️\u200d🌈 人工知能とは、 Привет мир! مرحبا नमस्ते สวัสดี 한국어",
)


def some_text(draw: random.Random) -> str:
    """Pieces of phrases, single characters of all scripts, and what words are cut at."""
    edges, parts = " \n\r\t'.,!()stdm0123456789abXY_-=", []
    for _ in range(draw.randint(1, 30)):
        point = draw.randrange(0x20, 0x30000)
        seen = unicodedata.category(chr(point)) not in ("Cn", "Cs")
        parts.append(chr(point) if seen and draw.random() < 0.3 else draw.choice(edges))
    begin = draw.randrange(10)
    return "".join(parts) + draw.choice(PHRASES)[begin : begin + 20]


@pytest.mark.slow
@pytest.mark.skipif(not (NODE and shutil.which("node")), reason="needs HEADWAY_LLAMA_CPP and node")
def test_the_same_tokens(tmp_path):
    """A tokenizer of `train_bpe`, on any text."""
    code = [path.read_text("utf-8") for path in Path(__file__).parent.glob("*.py")]
    tokenizer = train_bpe([*code, *PHRASES * 20], 2000, tmp_path / "tokenizer.json")
    model = replace(LLAMA, vocab_size=tokenizer.vocab_size)
    write_run(tmp_path / "run", model, tokenizer=str(tmp_path / "tokenizer.json"))
    with open_trained(tmp_path / "run") as source:
        assert export_gguf(source, tmp_path / "m.gguf", "float32")[1].exact
    draw = random.Random(0)
    texts = [*PHRASES, *code[0].splitlines(True), *(some_text(draw) for _ in range(2000))]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = Path(NODE) / f"tokenize-{os.getpid()}.mjs"
    script.write_text(TOKENIZE)
    words = ["node", script, tmp_path / "m.gguf", tmp_path / "texts.json", tmp_path / "ids.json"]
    try:
        subprocess.run(words, cwd=NODE, check=True, capture_output=True, timeout=120)
    finally:
        script.unlink()
    theirs = json.loads((tmp_path / "ids.json").read_text())
    for text, ids in zip(texts, theirs, strict=True):
        assert tokenizer.encode(text).tolist() == ids, text
