"""The tables of `headway`, read in both directions."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import MLAConfig, UsageError
from headway.hub.families import HEADWAY
from headway.hub.family import canonical
from headway.hub.folder import HubFolder
from headway.hub.load import load_model
from tests.compare import relative_error
from tests.hub.small_runs import MODELS, SMALL, export, random_model, write_run


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_goes_there_and_back(name):
    stored = random_model(MODELS[name]).state_dict()
    rows = list(HEADWAY.rows(MODELS[name], False))
    assert sorted(row.ours for row in rows) == sorted(stored)
    assert len({row.theirs for row in rows}) == len(rows)
    for row in rows:
        w = stored[row.ours]
        shape = tuple(w.shape)
        part = w[row.region(shape)]
        assert torch.equal(row.read(row.write(part, shape), shape), part)


def test_experts_lie_in_one_stack():
    """Expert e of head h is number h·E + e, its gate before its up projection, as `Linear` has it."""
    config = MODELS["multi_head"]
    stored = random_model(config).state_dict()
    rows = {row.ours: row for row in HEADWAY.rows(config, False)}
    w_in, w_out = (f"layers.1.ffn.experts.{name}" for name in ("w_in_HEGFL", "w_out_HEFL"))
    gate_up, down = (rows[n].write(stored[n], tuple(stored[n].shape)) for n in (w_in, w_out))
    assert gate_up.shape == (12, 32, 16) and down.shape == (12, 16, 16)
    gate, up = stored[w_in][1, 2]
    assert torch.equal(gate_up[8], torch.cat((gate, up)))
    assert torch.equal(down[8], stored[w_out][1, 2].T)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_the_same_model_again(name, tmp_path):
    """Ours → theirs → ours: all tensors, without the rows that padded the vocabulary."""
    ours = write_run(tmp_path / "run", MODELS[name]).state_dict()
    export(tmp_path / "run", tmp_path / "hf")
    with HubFolder(tmp_path / "hf") as folder:
        assert set(folder.names()) == set(ours) and not folder.skipped
        for tensor in folder.names():
            back = folder.read(tensor)
            assert torch.equal(back, ours[tensor][: len(back)]), tensor
        wanted = canonical(replace(MODELS[name], vocab_size=257, max_len=64))
        assert canonical(folder.config) == wanted


def test_a_transposed_expert_is_another_model(tmp_path):
    """The round trip fails where one expert is transposed, which has the same shape here."""
    from safetensors.torch import load_file, save_file

    ours = write_run(tmp_path / "run", MODELS["multi_head"]).state_dict()
    export(tmp_path / "run", tmp_path / "hf")
    path, name = tmp_path / "hf" / "model.safetensors", "model.layers.0.mlp.head_experts.down_proj"
    tensors = load_file(path)
    tensors[name][5] = tensors[name][5].T.clone()
    save_file(tensors, path, {"format": "pt"})
    with HubFolder(tmp_path / "hf") as folder:
        ours_name = "layers.0.ffn.experts.w_out_HEFL"
        differing = (folder.read(ours_name) != ours[ours_name]).flatten(2).any(-1)
        assert differing.nonzero().tolist() == [[0, 5]]
    loaded = load_model(tmp_path / "hf", "cpu", "float32")
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        there = loaded.model(tokens).logits_BSV
        here = random_model(MODELS["multi_head"])(tokens).logits_BSV[..., :257]
    assert relative_error(there, here) > 1e-3


def test_a_folder_is_loaded_like_a_run(tmp_path):
    model = write_run(tmp_path / "run", MODELS["multi_head_token"])
    export(tmp_path / "run", tmp_path / "hf")
    loaded, tokens = load_model(tmp_path / "hf", "cpu", "float32"), torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        here = model(tokens).logits_BSV[..., :257]
        assert relative_error(loaded.model(tokens).logits_BSV, here) < 1e-5
    assert loaded.info.eos_ids == (256,) and loaded.info.max_len == 64
    assert loaded.tokenizer.encode("é<|endoftext|>").tolist() == [*"é<|endoftext|>".encode()]


@settings(max_examples=50, deadline=None)
@given(
    d_head=st.integers(1, 8).map(lambda n: 2 * n),
    kv=st.sampled_from([0, 1, 2, 4]),
    window=st.lists(st.integers(0, 9), max_size=3),
    dense=st.sets(st.integers(0, 2)),
    step=st.integers(1, 3),
    reads=st.sampled_from(["auto", "token", "sub_token"]),
    scale=st.floats(0.1, 9),
)
def test_configs_of_any_values_come_back(d_head, kv, window, dense, step, reads, scale):
    moe = MODELS["multi_head"].moe
    router = replace(moe.router, reads=reads, scale=scale)
    moe = replace(moe, dense_layers=tuple(dense), sparse_step=step, router=router)
    model = replace(SMALL, n_layers=3, d_head=d_head, n_kv_heads=kv, window=tuple(window), moe=moe)
    assert HEADWAY.differences(model) == []
    back = HEADWAY.read(HEADWAY.write(model))
    assert [back.is_sparse(i) for i in range(3)] == [model.is_sparse(i) for i in range(3)]
    assert [back.window_of(i) for i in range(3)] == [model.window_of(i) for i in range(3)]
    assert back.kv_heads == model.kv_heads and back.head_width == d_head
    assert back.moe.router.scale == scale and back.moe.reads_token == moe.reads_token


def test_a_field_without_a_key_is_named(tmp_path):
    config = replace(SMALL, mixer="mla", mla=MLAConfig(8, 8, 8, 8, 8))
    write_run(tmp_path / "run", config)
    with pytest.raises(
        UsageError, match=r"no headway model has model\.mixer=mla, and in headway it is"
    ):
        export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_folders_from_before_the_options_of_published_families(tmp_path):
    """Their keys are missing in config.json; what they say is off."""
    write_run(tmp_path / "run", MODELS["multi_head"])
    export(tmp_path / "run", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text())
    for name in "rotary router_groups router_bias moe_expert_bias attention_sinks".split():
        del values[name]
    assert HEADWAY.read(values) == HEADWAY.read(json.loads(path.read_text()))
