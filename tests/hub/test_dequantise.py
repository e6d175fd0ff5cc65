"""FP8 and MXFP4 as published: the numbers of Transformers, in whole folders too."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.checkpoint.tensor_reader import TensorReader
from headway.config import UsageError
from headway.hub.dequantise import dequantised
from tests.command import call, mistake
from tests.hub.tiny import change_config, write_model

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def to_float8(w):
    """Values in e4m3 and scales by block of 128 × 128."""
    rows, columns = (-(-n // 128) for n in w.shape)
    scale = torch.empty(rows, columns)
    values = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            place = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
            scale[i, j] = w[place].abs().max() / 448
            values[place] = (w[place] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def to_mxfp4(w):
    """Blocks `[E, out, B, 16]` and scales `[E, out, B]` near `w [E, in, out]`."""
    generator = torch.Generator().manual_seed(int(w.numel()))
    E, n_in, n_out = w.shape
    blocks = torch.randint(256, (E, n_out, n_in // 32, 16), generator=generator).byte()
    return blocks, torch.randint(122, 126, blocks.shape[:3], generator=generator).byte()


def test_float8_is_what_transformers_gives(tmp_path):
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    values, scale = to_float8(torch.randn(256, 384))
    save_file(
        {"w": values, "w_scale_inv": scale, "n": torch.ones(3)}, tmp_path / "model.safetensors"
    )
    with TensorReader(tmp_path, "model") as reader:
        narrow = dequantised(reader, FP8)
        assert sorted(narrow.names()) == ["n", "w"] and narrow.dtype("w") == torch.bfloat16
        read = narrow.read("w")
        part = narrow.read("w", (slice(3, 200), slice(100, 300)), torch.float32)
        assert torch.equal(narrow.read("n"), torch.ones(3))
    dequantize = integration.Fp8Dequantize(None)._dequantize_one
    assert torch.equal(read, dequantize(values, scale, torch.bfloat16))
    assert torch.equal(part, read[3:200, 100:300].float())


def test_float8_with_blocks_at_the_edge(tmp_path):
    """The last blocks are smaller, as in published matrices whose size is no multiple of 128."""
    values, scale = to_float8(torch.randn(200, 130))
    save_file({"w": values, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    with TensorReader(tmp_path, "model") as reader:
        read = dequantised(reader, FP8).read("w")
    every = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :130]
    assert torch.equal(read, (values.float() * every).bfloat16())


def test_mxfp4_is_what_transformers_gives(tmp_path):
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = to_mxfp4(torch.empty(3, 96, 40))
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    with TensorReader(tmp_path, "model") as reader:
        narrow = dequantised(reader, {"quant_method": "mxfp4"})
        assert list(narrow.names()) == ["w"] and narrow.shape("w") == (3, 96, 40)
        read = narrow.read("w")
        one = narrow.read("w", (slice(1, 2), slice(0, 96), slice(2, 9)))
    assert torch.equal(read, integration.convert_moe_packed_tensors(blocks, scales))
    assert torch.equal(one, read[1:2, :, 2:9])


def write_float8(folder, family="qwen3_moe", **changes):
    """A folder whose projections are in FP8."""
    write_model(folder, family, dtype=torch.bfloat16, **changes)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        values, scale = to_float8(tensors[name].float())
        tensors |= {name: values, f"{name}_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=FP8)


def write_mxfp4(folder):
    """A folder whose experts are in MXFP4."""
    write_model(folder, "gpt_oss", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = to_mxfp4(tensors.pop(name))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4"})


@pytest.mark.parametrize("write", [write_float8, write_mxfp4])
def test_a_quantised_folder_computes_what_transformers_does(tmp_path, write):
    write(tmp_path / "theirs")
    done = call("import", tmp_path / "theirs", "--to", tmp_path / "run", "--check", "--json")
    assert done.code == 0, done
    assert done.json["greedy_equal"] and done.json["max_logit_difference"] <= 1e-5


def test_scales_that_are_missing_or_of_another_size(tmp_path):
    folder = tmp_path / "theirs"
    write_float8(folder)
    good = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"

    def said(tensors):
        save_file(tensors, folder / "model.safetensors")
        return mistake("import", folder, "--to", tmp_path / "run")

    assert f"{name} is stored in FP8 and has no {name}_scale_inv (1 such tensors)" in said(
        {k: x for k, x in good.items() if k != f"{name}_scale_inv"}
    )
    line = said({**good, f"{name}_scale_inv": torch.ones(2, 1)})
    assert "needs [1, 1] for blocks of 128 × 128" in line
    change_config(folder, quantization_config=...)
    assert "wrongly typed: " in said({k: x for k, x in good.items() if "scale_inv" not in k})
    change_config(folder, quantization_config={"quant_method": "gptq"})
    assert "quant_method=gptq, and only fp8 and mxfp4 are known" in said(good)


def test_blocks_without_scales(tmp_path):
    save_file({"w_blocks": torch.zeros(1, 2, 3, 16).byte()}, tmp_path / "model.safetensors")
    with (
        TensorReader(tmp_path, "model") as reader,
        pytest.raises(UsageError, match="w_blocks is stored in MXFP4 and has no w_scales"),
    ):
        dequantised(reader, json.loads('{"quant_method": "mxfp4"}'))
