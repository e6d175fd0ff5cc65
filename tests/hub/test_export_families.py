"""A model whose mathematics equals a known family's leaves as that family."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from headway.config import BalanceConfig, MoEConfig, RouterConfig, UsageError
from headway.hub.folder import HubFolder
from tests.command import call, mistake
from tests.compare import relative_error
from tests.hub.small_runs import MODELS, SMALL, export, write_run

transformers = pytest.importorskip("transformers", reason="the extra [hf] reads what was written")
FLAT = MoEConfig(kind="moe", n_experts=6, top_k=2, d_expert=16)
PLAIN = RouterConfig(gate="softmax_topk")
KNOWN = {
    "qwen3_moe": replace(SMALL, moe=FLAT, n_kv_heads=2, d_head=12),
    "mixtral": replace(SMALL, moe=FLAT, qk_norm="none", n_kv_heads=2),
    "olmoe": replace(SMALL, moe=replace(FLAT, router=PLAIN), qk_norm="all", clip_qkv=0.5),
    "qwen3": replace(SMALL, moe=MoEConfig(kind="dense"), tied=True),
    "llama": replace(SMALL, moe=MoEConfig(kind="dense"), qk_norm="none", d_head=12),
}


@pytest.mark.parametrize("name", KNOWN)
def test_it_is_found_and_transformers_computes_the_same(name, tmp_path):
    model = write_run(tmp_path / "run", KNOWN[name])
    args = ("--to", tmp_path / "hf", "--dtype", "float32", "--check", "--json")
    done = call("export", tmp_path / "run", *args)
    assert done.code == 0 and done.json["model_type"] == name, done
    assert done.json["greedy_equal"] and done.json["max_logit_difference"] < 1e-5
    assert "modeling_headway.py" not in done.json["files"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(1, 31).view(2, 15)
    with torch.no_grad():
        wanted = model(tokens).logits_BSV[..., :257]
        assert relative_error(theirs(tokens).logits, wanted) < 1e-5
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").decode([104, 105, 256])
    assert text.startswith("hi")


@pytest.mark.parametrize("name", KNOWN)
def test_it_comes_back_as_it_was(name, tmp_path):
    """Ours → theirs → ours → theirs: equal element by element, both times."""
    ours = write_run(tmp_path / "run", KNOWN[name]).state_dict()
    export(tmp_path / "run", tmp_path / "hf", family="auto")
    with HubFolder(tmp_path / "hf") as folder:
        for tensor in folder.names():
            back = folder.read(tensor)
            if not tensor.endswith("bias_HE"):
                assert torch.equal(back, ours[tensor][: len(back)]), tensor
    assert call("import", tmp_path / "hf", "--to", tmp_path / "again").code == 0
    export(tmp_path / "again", tmp_path / "hf2", family="auto")
    there, back = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "hf2"))
    assert set(there) == set(back) and all(torch.equal(there[n], back[n]) for n in there)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("hf", "hf2")]
    assert configs[0] == configs[1] and configs[0]["model_type"] == name


def test_every_engine_finds_its_spelling(tmp_path):
    """Experts one by one; keys of Transformers 4 and 5."""
    write_run(tmp_path / "run", KNOWN["qwen3_moe"])
    export(tmp_path / "run", tmp_path / "hf", "bfloat16", "auto")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["model.layers.1.mlp.experts.5.down_proj.weight"].shape == (32, 16)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 6
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_what_was_rounded_is_checked_too(tmp_path):
    write_run(tmp_path / "run", MODELS["multi_head"])
    done = call("export", tmp_path / "run", "--to", tmp_path / "hf", "--check", "--json")
    assert done.code == 0 and done.json["greedy_equal"], done
    assert (done.json["model_type"], done.json["dtype"]) == ("headway", "bfloat16")
    assert done.json["max_logit_difference"] < 1e-5


def test_a_wrong_folder_does_not_pass(tmp_path, monkeypatch):
    """One expert of the run and of its folder differ: exit code 1."""
    from headway.hub.layout import Row

    write = Row.write

    def turned(row, part, shape):
        theirs = write(row, part, shape)
        return theirs.T if row.theirs.endswith("0.mlp.experts.0.down_proj.weight") else theirs

    config = replace(KNOWN["qwen3_moe"], moe=replace(FLAT, d_expert=32))
    write_run(tmp_path / "run", config)
    monkeypatch.setattr(Row, "write", turned)
    done = call(
        "export", tmp_path / "run", "--to", tmp_path / "hf", "--dtype", "float32", "--check"
    )
    assert done.code == 1 and "Transformers reads another model" in done.err


def test_a_family_that_cannot_say_it_names_the_option(tmp_path):
    write_run(tmp_path / "run", MODELS["multi_head"])
    said = mistake("export", tmp_path / "run", "--to", tmp_path / "hf", "--as", "qwen3_moe")
    assert (
        "no qwen3_moe model has model.moe.kind=multi_head_latent, and" in said
        and "--as auto" in said
    )
    assert not (tmp_path / "hf").exists()


def test_a_bias_is_not_lost(tmp_path):
    """A selection bias that is not 0 needs a family that has one, whatever the config says."""
    bias = replace(FLAT, balance=BalanceConfig(aux=0.0, bias="sign"))
    write_run(tmp_path / "rule", replace(KNOWN["qwen3_moe"], moe=bias))
    assert export(tmp_path / "rule", tmp_path / "hf1", family="auto").model_type == "headway"
    write_run(tmp_path / "rest", KNOWN["qwen3_moe"], bias=True)
    assert export(tmp_path / "rest", tmp_path / "hf2", family="auto").model_type == "headway"
    with pytest.raises(
        UsageError, match=r"router\.bias_HE is not 0, and qwen3_moe has no tensor for it"
    ):
        export(tmp_path / "rest", tmp_path / "hf3", family="qwen3_moe")


def test_a_folder_with_code_of_its_own_is_imported_and_not_checked(tmp_path):
    write_run(tmp_path / "run", MODELS["multi_head_token"])
    export(tmp_path / "run", tmp_path / "hf")
    words = ("import", tmp_path / "hf", "--to")
    said = mistake(*words, tmp_path / "checked", "--check")
    assert "--check would run the code of" in said and "leave it out" in said
    assert not (tmp_path / "checked").exists()
    assert call(*words, tmp_path / "plain").code == 0
