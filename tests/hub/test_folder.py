"""Hugging Face folders that cannot be read: one line that says why, and nothing is left behind."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import call, mistake
from tests.hub.tiny import change_config, write_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder that can be read, in two shards."""
    folder = tmp_path_factory.mktemp("hub") / "whole"
    write_model(folder, "qwen3_moe", max_shard_size="100kB")
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    return folder


def _shard(folder, i=1):
    return folder / f"model-0000{i}-of-00002.safetensors"


def _truncate(folder):
    os.truncate(_shard(folder), _shard(folder).stat().st_size - 8)


def _tamper(folder):
    data = bytearray(_shard(folder).read_bytes())
    data[20] = ord("}")
    _shard(folder).write_bytes(data)


def _pickle_only(folder):
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _no_weights(folder):
    _pickle_only(folder)
    (folder / "pytorch_model.bin").unlink()


def _changed(**changes):
    return lambda folder: change_config(folder, **changes)


@pytest.mark.parametrize(
    "damage, words",
    [
        (_truncate, "model-00001-of-00002.safetensors is damaged: it has"),
        (_tamper, "model-00001-of-00002.safetensors is damaged"),
        (lambda f: _shard(f).unlink(), "cannot read .*00001-of-00002.safetensors: No such file"),
        (_pickle_only, "pytorch_model.bin, a pickle, .*save the model as safetensors"),
        (_no_weights, "holds no model.safetensors and no index"),
        (
            _changed(model_type="gpt9"),
            "model_type=gpt9 is not known; deepseek_v2, .*, mixtral, olmoe, ",
        ),
        (_changed(model_type=...), "model_type=None"),
        (_changed(hidden_size=...), "config.json has no hidden_size"),
        (_changed(num_hidden_layers=1), "left over: model.layers.1.input_layernorm.weight"),
        (_changed(num_hidden_layers=3), "missing: model.layers.2.input_layernorm.weight"),
        (_changed(vocab_size=384), r"lm_head.weight \(\[320, 32\] in the file, \[384, 32\] by"),
        (_changed(vocab_size=32), r"lm_head.weight \(\[320, 32\] in the file, \[32, 32\] by"),
        (_changed(hidden_act="gelu"), "hidden_act=gelu, and only silu is known"),
        (_changed(logit_scale=0.5), "logit_scale=0.5, which is not known of qwen3_moe"),
        (_changed(num_experts=8), "num_experts=8 and num_local_experts=4, .* same setting"),
        (_changed(mlp_only_layers=[1]), "missing: model.layers.0.mlp.experts.0"),
        (_changed(rope_theta=1e6), "rope_theta=1000000.0 and 10000.0"),
        (_changed(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type=dynamic"),
        (_changed(rope_parameters={"rope_theta": 1e4, "new": 3}), "new=3, which is not known"),
        (_changed(num_attention_heads="4"), "num_attention_heads='4', which is no int"),
        (_changed(rope_parameters={"rope_theta": "x"}), "value of another type"),
        (_changed(mlp_only_layers=3), "value of another type"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is no tokenizer.json"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line(whole, tmp_path, damage, words):
    shutil.copytree(whole, tmp_path / "theirs")
    damage(tmp_path / "theirs")
    line = mistake("import", tmp_path / "theirs", "--to", tmp_path / "run")
    assert re.search(words, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_where_a_run_can_be_written(whole, tmp_path):
    (tmp_path / "there").mkdir()
    assert "exists; choose another --to" in mistake("import", whole, "--to", tmp_path / "there")
    shutil.copytree(whole, tmp_path / "theirs")
    inside = tmp_path / "theirs" / "deep" / "run"
    assert "lies in" in mistake("import", tmp_path / "theirs", "--to", inside)
    assert not inside.parent.exists()
    assert "is no folder" in mistake("import", tmp_path / "none", "--to", tmp_path / "run")
    (tmp_path / "file").touch()
    line = mistake("import", whole, "--to", tmp_path / "file" / "run")
    assert "cannot write" in line and "there is no folder" in line


def test_a_full_disk_leaves_nothing(whole, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs more rights")
    try:
        line = mistake("import", whole, "--to", place / "run")
        assert "cannot write" in line and "No space left" in line
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_no_code_of_the_folder_runs(whole, tmp_path):
    """Not with --check either."""
    folder = tmp_path / "theirs"
    shutil.copytree(whole, folder)
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (folder / name).write_text(trap)
    auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    change_config(folder, auto_map=auto_map)
    assert call("import", folder, "--to", tmp_path / "run", "--check").code == 0
    assert not (tmp_path / "ran").exists()


def test_an_index_and_its_shards_contradict(whole, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(whole, folder)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    moved = {name: _shard(folder).name for name in places}
    index.write_text(json.dumps({"weight_map": moved}))
    assert "which does not hold it" in mistake("import", folder, "--to", tmp_path / "run")
    tensors = load_file(_shard(folder))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, _shard(folder).name)}))
    assert "missing: " in mistake("import", folder, "--to", tmp_path / "run")
    save_file(tensors, _shard(folder, 2))
    index.write_text(json.dumps({"weight_map": places}))
    assert "is in two files" in mistake("import", folder, "--to", tmp_path / "run")


def test_keys_that_change_no_number_are_passed_over(whole, tmp_path):
    """As those that Transformers writes for a model it has read from a GGUF file."""
    shutil.copytree(whole, tmp_path / "theirs")
    _changed(_model_name_or_path="SmolLM2", unk_token_id=3)(tmp_path / "theirs")
    assert call("import", tmp_path / "theirs", "--to", tmp_path / "run").code == 0
