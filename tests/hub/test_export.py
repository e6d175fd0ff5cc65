"""An exported folder, read by Transformers, is the same model."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headway.config import MLAConfig, UsageError
from headway.data.tokenizer import ByteTokenizer
from headway.hub.memory import peak_memory
from tests.command import call, mistake
from tests.compare import relative_error as error
from tests.hub.small_runs import MODELS, export, write_run

pytest.importorskip("transformers", reason="the extra [hf] reads what was written")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A model and the folder it was exported to."""
    root = tmp_path_factory.mktemp(request.param)
    model = write_run(root / "run", MODELS[request.param])
    export(root / "run", root / "hf", "float32")
    return model, root / "hf"


def read(folder: Path, **how):
    """The folder in Transformers, with the code that it holds."""
    from headway.hub.remote.modeling_headway import HeadwayForCausalLM

    return HeadwayForCausalLM.from_pretrained(folder, **how).eval()


def tokens(batch=3, length=13):
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_are_the_same(pair, implementation):
    model, folder = pair
    with torch.no_grad():
        ours = model(tokens()).logits_BSV[..., :257]
        theirs = read(folder, experts_implementation=implementation)(tokens()).logits
    assert theirs.dtype == torch.float32 and ours.std() > 0.1
    assert error(theirs, ours) < 1e-5


def test_logits_are_the_same_in_float64(pair):
    model, folder = pair
    with torch.no_grad():
        wide = model.double()
        wide.dtype = torch.float64
        ours = wide(tokens()).logits_BSV[..., :257]
        theirs = read(folder, dtype=torch.float64, experts_implementation="eager").double()
        assert error(theirs(tokens()).logits, ours) < 1e-12
    wide.float().dtype = torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cache_and_padding_on_the_left_change_nothing(pair, attention):
    """More tokens than the windows hold, in parts; and a batch of texts of different lengths."""
    _, folder = pair
    theirs = read(folder, attn_implementation=attention)
    ids = tokens(batch=2, length=16)
    with torch.no_grad():
        whole = theirs(ids).logits
        cache, parts = None, []
        for part in ids.split([7, 1, 1, 5, 2], dim=1):
            out = theirs(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        assert error(torch.cat(parts, 1), whole) < 1e-5
        short = ids[1:, :9]
        padded = torch.cat((torch.full((1, 7), 256), short), 1)
        mask = torch.ones(2, 16, dtype=torch.long)
        mask[1, :7] = 0
        batch = theirs(torch.cat((ids[:1], padded)), attention_mask=mask).logits
        assert error(batch[0], whole[0]) < 1e-5
        assert error(batch[1, 7:], theirs(short).logits[0]) < 1e-5
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    together = theirs.generate(torch.cat((ids[:1], padded)), attention_mask=mask, **how)
    alone = theirs.generate(short, attention_mask=torch.ones_like(short), **how)[0, 9:]
    assert together[1, 16 : 16 + len(alone)].tolist() == alone.tolist()


def test_labels_and_backward(pair):
    """The loss is the mean over the next tokens; its gradients are those of our model."""
    model, folder = pair
    theirs, ids = read(folder), tokens(batch=2)
    loss = theirs(ids, labels=ids).loss
    loss.backward()
    model.zero_grad()
    # no row of the padding takes part in the softmax of a folder
    logits = model(ids).logits_BSV[:, :-1, :257]
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    ours.backward()
    assert error(loss.detach(), ours.detach()) < 1e-5
    assert all(p.grad is not None for p in theirs.parameters())
    assert error(theirs.model.embed_tokens.weight.grad, model.embed.weight.grad[:257]) < 1e-4
    mine, others = model.layers[1].mixer.q.weight.grad, theirs.model.layers[1].self_attn
    assert error(others.q_proj.weight.grad, mine) < 1e-4


def test_save_pretrained_and_back(pair, tmp_path):
    _, folder = pair
    theirs = read(folder)
    theirs.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(read(tmp_path / "again")(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("name", ["multi_head", "latent", "flat"])
def test_each_router_bias_counts_and_stays_float32(name, tmp_path):
    """In bfloat16 it would be rounded, and most tokens would take other experts."""
    write_run(tmp_path / "run", MODELS[name])
    export(tmp_path / "run", tmp_path / "hf", "bfloat16")
    theirs = read(tmp_path / "hf", dtype=torch.bfloat16)
    for module in (theirs, theirs.bfloat16(), theirs.half().bfloat16()):
        buffers = dict(module.named_buffers())
        assert {b.dtype for b in buffers.values()} == {torch.float32}
    buffers = {n: b for n, b in buffers.items() if "e_score_correction_bias" in n}
    assert len(buffers) == MODELS[name].n_sparse
    with torch.no_grad():
        before = theirs(tokens()).logits
        for bias in buffers.values():
            values = bias.clone()
            bias.zero_()
            assert not torch.equal(theirs(tokens()).logits, before)
            bias.copy_(values)
    router, norm = theirs.model.layers[1].mlp.router, theirs.model.norm
    assert router.weight.dtype == norm.weight.dtype == torch.float32
    assert theirs.lm_head.weight.dtype == torch.bfloat16


def test_widths_that_grouped_mm_cannot_read(tmp_path):
    """`eager` is the default then, and asking for `grouped_mm` says what else there is."""
    config = MODELS["multi_head"]
    config = replace(config, moe=replace(config.moe, d_expert=10))
    model = write_run(tmp_path / "run", config)
    export(tmp_path / "run", tmp_path / "hf", "float32")
    theirs = read(tmp_path / "hf")
    with torch.no_grad():
        assert error(theirs(tokens()).logits, model(tokens()).logits_BSV[..., :257]) < 1e-5
    with pytest.raises(ValueError, match=r"one is 10; use experts_implementation='eager' or"):
        read(tmp_path / "hf", experts_implementation="grouped_mm")


ALONE = """
import json, sys
sys.modules["headway"] = None  # an import of it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
texts = {}
for implementation in ("eager", "grouped_mm", "batched_mm"):
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, experts_implementation=implementation)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids.input_ids.shape[1]:]
    texts[implementation] = tokenizer.decode(out, skip_special_tokens=True)
print(json.dumps(texts))
"""


def test_transformers_alone_writes_the_same_text(tmp_path):
    """In a process where Headway cannot be imported."""
    write_run(tmp_path / "run", MODELS["multi_head_token"])
    args = ("--as", "headway", "--dtype", "float32", "--json")
    done = call("export", tmp_path / "run", "--to", tmp_path / "hf", *args)
    assert done.code == 0 and done.err == "", done
    files = {path.name: path.stat().st_size for path in (tmp_path / "hf").iterdir()}
    assert done.json == {
        "model_type": "headway",
        "format": "hf",
        "dtype": "float32",
        "files": sorted(files),
        "bytes": sum(files.values()),
        "left_out": [],
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    there = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "hf", "def f("],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert there.returncode == 0, there.stderr
    texts = json.loads(there.stdout.splitlines()[-1])
    how = ("--tokens", 48, "--temperature", 0, "--dtype", "float32", "--json")
    ours = call("sample", tmp_path / "run", "--prompt", "def f(", *how).json["text"]
    assert len(ours) > 10 and texts == dict.fromkeys(IMPLEMENTATIONS, ours)


def test_the_card_says_what_the_run_recorded(pair):
    _, folder = pair
    card = (folder / "README.md").read_text()
    for words in ("| parameters | 12,345 |", "| 678 |", "| 4,096 |", "| 2.5000 |", "`0123abc`"):
        assert words in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_config_has_no_row_that_only_pads(pair):
    _, folder = pair
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == ByteTokenizer.vocab_size
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["eos_token_id"] == 256 and config["max_position_embeddings"] == 64


def test_several_files_with_an_index(tmp_path):
    from safetensors.torch import load_file

    write_run(tmp_path / "run", MODELS["multi_head"])
    export(tmp_path / "run", tmp_path / "whole", "bfloat16")
    export(tmp_path / "run", tmp_path / "parts", "bfloat16", max_file_bytes=40_000)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    whole, files = (
        load_file(tmp_path / "whole" / "model.safetensors"),
        set(index["weight_map"].values()),
    )
    parts = {}
    for name in files:
        tensors = load_file(tmp_path / "parts" / name)
        assert all(index["weight_map"][key] == name for key in tensors)
        parts |= tensors
    assert len(files) > 2 and set(parts) == set(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    total = sum(t.numel() * t.element_size() for t in whole.values())
    assert index["metadata"]["total_size"] == total


def test_memory_is_that_of_one_tensor(tmp_path):
    config = MODELS["multi_head"]
    moe = replace(config.moe, n_experts=64, d_expert=96, n_heads=1)
    write_run(tmp_path / "run", replace(config, d_model=128, n_layers=8, moe=moe))
    export(tmp_path / "run", tmp_path / "warm")  # what is imported and allocated once
    with peak_memory() as peak:
        export(tmp_path / "run", tmp_path / "hf")
    largest, whole = 64 * 2 * 96 * 128 * 4, (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert whole > 70e6 and peak.bytes < 3 * largest + 20e6


def test_what_only_training_reads_is_named(tmp_path):
    config = MODELS["multi_head"]
    router = replace(config.moe.router, noisy=True, jitter=0.1)
    write_run(tmp_path / "run", replace(config, moe=replace(config.moe, router=router)))
    done = call("export", tmp_path / "run", "--to", tmp_path / "hf", "--json")
    assert done.json["left_out"] == [f"layers.{i}.ffn.router.w_noise_HEL" for i in (0, 1)]
    assert "only training reads layers.0.ffn.router.w_noise_HEL and 1 more" in done.err


def test_why_a_folder_holds_code_is_said(tmp_path):
    """Nobody asked for it here; and where nothing can say the model, both reasons are named."""
    write_run(tmp_path / "run", MODELS["dense"])
    done = call("export", tmp_path / "run", "--to", tmp_path / "hf")
    assert "trust_remote_code=True: model.activation=gelu, and in qwen3 it is swiglu" in done.err
    latent = replace(MODELS["latent"], mixer="mla", mla=MLAConfig(8, 8, 8, 8, 8), window=())
    write_run(tmp_path / "mla", replace(latent, qk_norm="head"))
    line = mistake("export", tmp_path / "mla", "--to", tmp_path / "no")
    assert "no family computes this model: model." in line
    assert "; model.mixer=mla, and in headway it is attention" in line


def test_mistakes_cost_a_line(tmp_path):
    write_run(tmp_path / "run", MODELS["dense"])
    run, to = tmp_path / "run", tmp_path / "hf"
    assert "model_type=gpt9 is not known; deepseek_v2" in mistake(
        "export", run, "--to", to, "--as", "gpt9"
    )
    assert "exists; choose another --to" in mistake("export", run, "--to", tmp_path)
    assert f"no folder {tmp_path / 'no'}" in mistake("export", run, "--to", tmp_path / "no" / "hf")
    assert "nothing does not exist; give a run" in mistake(
        "export", tmp_path / "nothing", "--to", to
    )
    assert "invalid choice" in mistake("export", run, "--to", to, "--dtype", "int8")
    os.truncate(next((run / "checkpoints").glob("*/model.safetensors")), 1000)
    assert "has no whole checkpoint" in mistake("export", run, "--to", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    write_run(tmp_path / "run", MODELS["dense"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    line = mistake("export", tmp_path / "run", "--to", tmp_path / "hf")
    assert f"cannot write {tmp_path / 'hf'}: No space left on device" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_modules_of_your_own_have_no_place(tmp_path):
    from safetensors.torch import load_file, save_file

    from headway.checkpoint.checkpoint_dir import digest, write_json

    write_run(tmp_path / "run", MODELS["dense"])
    path = next((tmp_path / "run" / "checkpoints").iterdir())
    save_file(
        load_file(path / "model.safetensors") | {"layers.0.mixer.extra": torch.ones(2)},
        path / "model.safetensors",
    )
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = digest(path / "model.safetensors")
    write_json(path / "manifest.json", manifest)
    with pytest.raises(
        UsageError, match=r"layers\.0\.mixer\.extra is not 0, and headway has no tensor"
    ):
        export(tmp_path / "run", tmp_path / "hf", "float32")
    assert not (tmp_path / "hf").exists()
