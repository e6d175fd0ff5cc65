"""A GGUF file holds the tensors, the numbers and the tokenizer that llama.cpp computes with."""

import json
from dataclasses import replace

import pytest
import torch

from headway.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from headway.hub.families import find_family
from headway.hub.gguf_graph import graph_of
from headway.hub.gguf_tokenizer import gguf_tokenizer
from tests.command import call, mistake
from tests.hub.small_runs import MODELS, SMALL, write_run
from tests.hub.test_export_families import FLAT, KNOWN, PLAIN

gguf = pytest.importorskip("gguf", reason="the extra [gguf] reads what was written")
OLMOE = replace(KNOWN["olmoe"], clip_qkv=0.0)
QWEN2_MOE = replace(
    SMALL,
    moe=replace(FLAT, router=PLAIN, d_shared=24, shared_gate=True),
    qk_norm="none",
    qkv_bias=True,
)
LLAMA = replace(KNOWN["llama"], qkv_bias=True, o_bias=True)


def written(tmp_path, config, dtype="float32", **how):
    """The model of a run, the fields and the tensors of its file."""
    model = write_run(tmp_path / "run", config, **how)
    args = ("--to", tmp_path / "m.gguf", "--format", "gguf", "--dtype", dtype, "--json")
    done = call("export", tmp_path / "run", *args)
    assert done.code == 0 and done.json["format"] == "gguf", done
    assert done.json["files"] == ["m.gguf"]
    assert done.json["bytes"] == (tmp_path / "m.gguf").stat().st_size
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return model.state_dict(), fields, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor):
    """A tensor of a file in float32; GGUF counts dims from the last."""
    data = torch.from_numpy(tensor.data.copy())
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        data = data.view(torch.bfloat16)
    return data.float().reshape([int(n) for n in reversed(tensor.shape)])


def test_tensors_of_a_mixture(tmp_path):
    ours, fields, tensors = written(tmp_path, KNOWN["qwen3_moe"])
    assert fields["general.architecture"] == "qwen3moe"
    w_in, w_out = (ours[f"layers.1.ffn.experts.{n}"][0] for n in ("w_in_HEGFL", "w_out_HEFL"))
    assert torch.equal(values(tensors["blk.1.ffn_gate_exps.weight"]), w_in[:, 0])
    assert torch.equal(values(tensors["blk.1.ffn_up_exps.weight"]), w_in[:, 1])
    assert torch.equal(values(tensors["blk.1.ffn_down_exps.weight"]), w_out.transpose(1, 2))
    assert torch.equal(values(tensors["token_embd.weight"]), ours["embed.weight"][:257])
    assert torch.equal(values(tensors["output.weight"]), ours["head.weight"][:257])
    assert torch.equal(values(tensors["blk.0.attn_q.weight"]), ours["layers.0.mixer.q.weight"])
    sizes = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 16}
    sizes |= {"block_count": 2, "context_length": 64, "embedding_length": 32}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 12}
    assert {name: fields[f"qwen3moe.{name}"] for name in sizes} == sizes
    assert fields["qwen3moe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_llama_rotates_neighbours(tmp_path):
    """Rows i and i + d/2 of a head of q and k come to lie side by side, and so do their biases."""
    rope = replace(SMALL.rope, scaling="llama3", factor=8.0, original_max_len=32)
    ours, fields, tensors = written(tmp_path, replace(LLAMA, rope=rope))
    for name, heads in (("q", 4), ("k", 4)):
        halves = ours[f"layers.1.mixer.{name}.weight"].view(heads, 2, 6, 32)
        wanted = torch.stack((halves[:, 0], halves[:, 1]), 2).reshape(-1, 32)
        assert torch.equal(values(tensors[f"blk.1.attn_{name}.weight"]), wanted)
        halves = ours[f"layers.1.mixer.{name}.bias"].view(heads, 2, 6)
        wanted = torch.stack((halves[:, 0], halves[:, 1]), 2).flatten()
        assert torch.equal(values(tensors[f"blk.1.attn_{name}.bias"]), wanted)
    assert torch.equal(values(tensors["blk.1.attn_v.weight"]), ours["layers.1.mixer.v.weight"])
    gate, up = ours["layers.0.ffn.w_in.weight"].chunk(2)
    assert torch.equal(values(tensors["blk.0.ffn_gate.weight"]), gate)
    assert torch.equal(values(tensors["blk.0.ffn_up.weight"]), up)
    factors = values(tensors["rope_freqs.weight"])
    assert factors[0] == 1 and factors[-1] == 8 and factors.diff().min() >= 0
    assert fields["llama.rope.freq_base"] == 10_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_and_routers_stay_float32(tmp_path, dtype):
    ours, fields, tensors = written(tmp_path, QWEN2_MOE, dtype)
    kinds = gguf.GGMLQuantizationType
    narrow = {"bfloat16": kinds.BF16, "float16": kinds.F16}[dtype]
    for name, tensor in tensors.items():
        wide = "norm" in name or "gate_inp" in name or name.endswith("bias")
        assert tensor.tensor_type == (kinds.F32 if wide else narrow), name
    w = ours["layers.0.ffn.experts.w_in_HEGFL"][0, :, 1]
    rounded = w.to({"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]).float()
    assert torch.equal(values(tensors["blk.0.ffn_up_exps.weight"]), rounded)
    gate = ours["layers.0.ffn.shared_gate.weight"]
    assert torch.equal(values(tensors["blk.0.ffn_gate_inp_shexp.weight"]), gate[0])
    assert fields["general.file_type"] == {"bfloat16": 32, "float16": 1}[dtype]


def test_a_tied_head_is_written_where_the_graph_needs_it(tmp_path):
    ours, _, tensors = written(tmp_path, replace(OLMOE, tied=True))
    assert torch.equal(values(tensors["output.weight"]), ours["embed.weight"][:257])
    assert "output.weight" not in written(tmp_path / "q", KNOWN["qwen3"])[2]


def test_the_tokenizer_of_bytes(tmp_path):
    _, fields, _ = written(tmp_path, KNOWN["qwen3"])
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 257 and tokens[256] == "<|endoftext|>" and tokens[97] == "a"
    assert fields["tokenizer.ggml.token_type"] == [1] * 256 + [3]
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.padding_token_id"] == 256
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert "capitalize" in fields["tokenizer.chat_template"]
    # no UTF-8 holds the two bytes of its one merge
    merge = fields["tokenizer.ggml.merges"][0].split()
    assert [tokens.index(token) for token in merge] == [0xC0, 0xC0]


def test_how_words_are_cut(tmp_path):
    def pre(pre_tokenizer):
        spec["pre_tokenizer"] = pre_tokenizer
        (tmp_path / "t.json").write_text(json.dumps(spec))
        return gguf_tokenizer(load_tokenizer(str(tmp_path / "t.json")))[3:]

    ours = train_bpe(["the cat sat on the mat. " * 50], 300, tmp_path / "t.json")
    spec = json.loads(ours.to_json())
    written = gguf_tokenizer(ours)
    assert (written.pre, written.exact) == ("qwen2", True)
    assert [m.replace(" ", "") in written.tokens for m in written.merges] == [True] * len(
        written.merges
    )
    assert written.types[0] == 3 and len(written.tokens) == ours.vocab_size
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    assert pre({**byte_level, "use_regex": True}) == ("gpt-2", True)
    digits = {"type": "Digits", "individual_digits": True}
    both = {"type": "Sequence", "pretokenizers": [digits, {**byte_level, "use_regex": True}]}
    assert pre(both) == ("smollm", True)
    assert gguf_tokenizer(ByteTokenizer()).exact
    words = json.loads(ours.to_json())["pre_tokenizer"]
    split = words["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|")
    assert pre(words) == ("llama-bpe", True)
    split["Regex"] = split["Regex"].replace("{1,3}", "{1,2}")  # as our first tokenizers
    assert pre(words) == ("llama-bpe", False)
    run = tmp_path / "run"
    write_run(run, replace(KNOWN["qwen3"], vocab_size=320), tokenizer=str(tmp_path / "t.json"))
    done = call("export", run, "--to", tmp_path / "m.gguf", "--format", "gguf")
    assert done.code == 0 and "its nearest is llama-bpe, which cuts some words" in done.err, done


REFUSED = {
    "always renormalises gates": ("qwen3_moe", replace(KNOWN["qwen3_moe"], moe=replace(FLAT, router=PLAIN))),
    "never renormalises gates": ("olmoe", replace(OLMOE, moe=FLAT)),
    "has as many key heads": ("olmoe", replace(OLMOE, n_kv_heads=2)),
    "has heads of width 32 together, that of the model, and not 48": ("qwen2_moe", replace(QWEN2_MOE, d_head=12)),
    "clamps nothing, and model.clip_qkv=0.5": ("olmoe", KNOWN["olmoe"]),
    "has no biases for model.qkv_bias=True": ("qwen3", replace(KNOWN["qwen3"], qkv_bias=True)),
    "has no biases for model.qkv_bias=False, o_bias=True": ("qwen2_moe", replace(QWEN2_MOE, qkv_bias=False, o_bias=True)),
    "has experts in all layers, and 1 here": ("qwen3_moe", replace(KNOWN["qwen3_moe"], moe=replace(FLAT, n_dense_layers=1))),
    "attends to everything": ("mixtral", replace(KNOWN["mixtral"], window=(8,))),
    "is not written with model.rope.scaling=yarn": (
        "qwen3",
        replace(KNOWN["qwen3"], rope=replace(SMALL.rope, scaling="yarn", factor=2.0, original_max_len=32)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_llama_cpp_would_compute_wrongly_is_refused(reason):
    family, config = REFUSED[reason]
    with pytest.raises(ValueError, match=rf"llama\.cpp's \w+ {reason}.*; use --format hf"):
        graph_of(find_family(family), config)


def test_a_model_without_a_graph(tmp_path):
    write_run(tmp_path / "run", MODELS["multi_head"])
    to = tmp_path / "m.gguf"
    for words, reason in (([], "of this model: model.moe.kind=multi_head_latent, and in qwen3_moe it is"),
                          (["--as", "headway"], "of headway models")):  # fmt: skip
        line = mistake("export", tmp_path / "run", "--to", to, "--format", "gguf", *words)
        assert f"no GGUF is written {reason}" in line
    assert "--check reads Hugging Face folders" in mistake(
        "export", tmp_path / "run", "--to", to, "--format", "gguf", "--check"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
