"""`headway import`: what comes in computes what Transformers computes, and nothing is lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.checkpoint import checkpoint_dir
from headway.checkpoint.tensor_reader import TensorReader
from headway.hub.families import FAMILIES
from headway.hub.load import load_model
from tests.command import call, mistake
from tests.hub.tiny import CONFIGS, change_config, write_model

KEYS = """
family parameters active_parameters tensors_read skipped max_logit_difference greedy_equal
peak_memory_bytes checkpoint
""".split()
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_every_family_is_here():
    assert {family.name for family in FAMILIES} == set(CONFIGS)


@pytest.mark.parametrize(
    "family, changes",
    [
        *((family, changes) for family in CONFIGS for changes in ({}, {"fused": True})),
        ("qwen3_moe", {"dtype": torch.bfloat16, "max_shard_size": "30kB"}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
        ("qwen3_moe", {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("olmoe", {"norm_topk_prob": True, "clip_qkv": None, "attention_bias": True}),
        ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e3}}),
        ("llama", {"num_key_value_heads": None, "attention_bias": False}),
        ("mixtral", {"sliding_window": 5}),
        ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": True}),
        ("deepseek_v3", {"rope_interleave": False, "rope_parameters": None, "topk_group": 4}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
    ids=str,
)
def test_an_import_computes_what_transformers_does(tmp_path, family, changes):
    theirs = write_model(tmp_path / "theirs", family, **changes)
    done = call("import", tmp_path / "theirs", "--to", tmp_path / "run", "--check", "--json")
    assert done.code == 0, done
    answer = done.json
    assert list(answer) == [*KEYS[:5], *KEYS[7:], *KEYS[5:7]] and answer["family"] == family
    assert answer["greedy_equal"] and answer["max_logit_difference"] <= 1e-5
    assert answer["skipped"] == [] and answer["tensors_read"] == len(_tensors(tmp_path / "theirs"))
    assert answer["parameters"] == sum(p.numel() for p in theirs.parameters())
    assert answer["active_parameters"] <= answer["parameters"]
    assert Path(answer["checkpoint"]) == tmp_path / "run" / "checkpoints" / "step-000000"
    assert checkpoint_dir.verify(Path(answer["checkpoint"])) == ""
    with TensorReader(Path(answer["checkpoint"]), "model") as reader:
        stored = {reader.dtype(name) for name in reader.names() if "bias_HE" not in name}
    assert stored == {changes.get("dtype", torch.float32)}


def _tensors(folder):
    return {k: x for path in folder.glob("*.safetensors") for k, x in load_file(path).items()}


def test_both_forms_and_spellings_give_the_same_run(tmp_path):
    """Experts one by one and fused; config.json as Transformers 4 and 5 write it."""
    write_model(tmp_path / "v5", "qwen3_moe", fused=True)
    write_model(tmp_path / "v4", "qwen3_moe")
    values = json.loads((tmp_path / "v4" / "config.json").read_text())
    theta = values["rope_parameters"]["rope_theta"]
    change_config(
        tmp_path / "v4",
        rope_parameters=...,
        rope_theta=theta,
        rope_scaling=None,
        num_local_experts=...,
        num_experts=4,
        dtype=...,
        torch_dtype="float32",
    )
    for form in ("v4", "v5"):
        assert call("import", tmp_path / form, "--to", tmp_path / f"run-{form}").code == 0
    a, b = (
        load_file(tmp_path / f"run-{form}" / "checkpoints" / "step-000000" / "model.safetensors")
        for form in ("v4", "v5")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    models = [json.loads((tmp_path / f"run-{f}" / "run.json").read_text()) for f in ("v4", "v5")]
    assert models[0]["config"]["model"] == models[1]["config"]["model"]


def test_verbs_read_an_imported_run_and_the_folder_itself(tmp_path):
    write_model(tmp_path / "theirs", "mixtral")
    tokenizer_config = {"eos_token": "at", "chat_template": "{{ messages }}"}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    assert call("import", tmp_path / "theirs", "--to", tmp_path / "run").code == 0
    shutil.move(tmp_path / "run", tmp_path / "moved")
    texts = []
    for place in (tmp_path / "theirs", tmp_path / "moved"):
        options = ("--prompt", "the cat", "--tokens", 12, "--temperature", 0, "--dtype", "float32")
        texts.append(call("sample", place, *options, "--json").json["text"])
        info = load_model(place).info
        assert (info.chat_template, info.max_len) == ("{{ messages }}", 128)
        assert info.eos_ids[0] == 0 and len(info.eos_ids) == 2
    assert texts[0] == texts[1] != ""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    losses = [
        call("eval", place, "--data", tmp_path / "text.txt", "--json").json["val_bits_per_byte"]
        for place in (tmp_path / "theirs", tmp_path / "moved")
    ]
    assert losses[0] == losses[1]


def test_an_imported_model_is_trained_on_other_data(tmp_path):
    """From its weights at step 0, with options of its own but for the model's; interrupted before
    the first checkpoint it begins again there."""
    write_model(tmp_path / "theirs", "qwen3_moe", dtype=torch.bfloat16)
    call("import", tmp_path / "theirs", "--to", tmp_path / "run")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    start, tuned = tmp_path / "run" / "checkpoints" / "step-000000", tmp_path / "tuned"
    options = ("--data", tmp_path / "text.txt", "--data.seq-len", 32, "--steps", 6, "--json")
    done = call("train", "--resume", start, "--run", tuned, *options)
    assert done.code == 0 and f"starts from the weights of {tuned}" in done.out, done
    first = call("eval", tmp_path / "run", "--data", tmp_path / "text.txt", "--json").json
    assert done.json["first_val_bits_per_byte"] == pytest.approx(
        first["val_bits_per_byte"], rel=0.1
    )
    assert done.json["val_bits_per_byte"] < done.json["first_val_bits_per_byte"]
    assert call("train", "--resume", tuned, "--json").json["steps"] == 6
    shutil.rmtree(tuned / "checkpoints")
    checkpoint_dir.copy(start, tuned)
    again = call("train", "--resume", tuned, "--json")
    assert again.json["val_bits_per_byte"] == done.json["val_bits_per_byte"]
    line = mistake("train", "--resume", start, "--run", tmp_path / "x", "--model.n-layers", 3)
    assert "model.n_layers is 2 in" in line


def test_what_is_missing_left_over_wrongly_shaped_or_typed_is_named(tmp_path):
    folder, out = tmp_path / "theirs", tmp_path / "run"
    write_model(folder, "olmoe")
    good = load_file(folder / "model.safetensors")
    expert = "model.layers.1.mlp.experts.2.up_proj.weight"

    def said(tensors):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        line = mistake("import", folder, "--to", out)
        assert not out.exists() and [p.name for p in tmp_path.iterdir()] == ["theirs"]
        return line

    assert f"1 missing: {expert}" in said({k: x for k, x in good.items() if k != expert})
    assert "1 left over: model.layers.1.mlp.extra" in said(
        {**good, "model.layers.1.mlp.extra": torch.ones(2)}
    )
    line = said({**good, expert: good[expert].T.contiguous()})
    assert f"1 wrongly shaped: {expert} ([32, 48] in the file, [48, 32] by config.json)" in line
    assert f"1 wrongly typed: {expert} (int32)" in said({**good, expert: good[expert].int()})
    line = said({k: x for k, x in good.items() if "layers.1" not in k})
    assert "21 missing: model.layers.1.input_layernorm.weight, model.layers.1.mlp.experts.0" in line
    assert line.endswith(" and 18 more")


def test_a_head_beside_the_embedding_that_it_is_tied_to(tmp_path):
    """Some folders hold it twice; one that differs is refused."""
    folder = tmp_path / "theirs"
    write_model(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    done = call("import", folder, "--to", tmp_path / "run", "--json")
    assert done.code == 0 and done.json["tensors_read"] == len(tensors)
    save_file({**tensors, "lm_head.weight": head + 1}, folder / "model.safetensors")
    line = mistake("import", folder, "--to", tmp_path / "other")
    assert "lm_head.weight differs from model.embed_tokens.weight" in line


def test_layers_for_multi_token_prediction_are_left_out_and_listed(tmp_path):
    folder = tmp_path / "theirs"
    write_model(folder, "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    ahead = {"model.layers.2.eh_proj.weight": torch.ones(2), "model.layers.2.x": torch.ones(3)}
    save_file({**tensors, **ahead}, folder / "model.safetensors")
    assert "2 left over: model.layers.2.eh_proj.weight" in mistake(
        "import", folder, "--to", tmp_path / "run"
    )
    change_config(folder, num_nextn_predict_layers=1)
    done = call("import", folder, "--to", tmp_path / "run", "--json")
    assert done.json["skipped"] == sorted(ahead) and "left out: model.layers.2.x" in done.out
    assert done.json["tensors_read"] == len(tensors)


def _write_big(folder, fused):
    """Two layers of 32 experts each, 200 MB in float32; the largest tensor is 50 MB fused and 4 MB
    otherwise."""
    shape = {"num_experts": 32, "moe_intermediate_size": 512, "mlp_only_layers": []}
    write_model(folder, "qwen3_moe", fused=fused, hidden_size=512, **shape)


MEASURE = """
import json, sys
from pathlib import Path
import torch
from headway.hub.import_model import import_model

torch.set_num_threads(1)
print(import_model(Path(sys.argv[1]), Path(sys.argv[2])).peak_memory_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_memory_is_that_of_a_few_tensors(tmp_path, fused):
    _write_big(tmp_path / "theirs", fused)
    largest = max(x.nbytes for x in _tensors(tmp_path / "theirs").values())
    size = sum(x.nbytes for x in _tensors(tmp_path / "theirs").values())
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert size > 200e6 and int(done.stdout) < 3 * largest + 30e6


def test_a_difference_from_transformers_fails_the_check(tmp_path, monkeypatch):
    """As when the rows of one expert were read in another order."""
    write_model(tmp_path / "theirs", "mixtral")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    shutil.copytree(tmp_path / "theirs", tmp_path / "other")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    save_file(
        {**tensors, name: tensors[name].flip(0)},
        tmp_path / "other" / "model.safetensors",
        {"format": "pt"},
    )
    from headway.hub import check

    compare = check.compare
    monkeypatch.setattr(check, "compare", lambda _, run: compare(tmp_path / "other", run))
    done = call("import", tmp_path / "theirs", "--to", tmp_path / "run", "--check", "--json")
    assert done.code == 1 and done.json["max_logit_difference"] > 1e-3
    assert "does not compute what Transformers does" in done.err
