"""Reading safetensors: whole, in part, in another dtype; what is damaged is named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from headway.checkpoint.tensor_reader import TensorReader
from headway.config import UsageError

TENSORS = {
    "a": torch.randn(5, 3, 4),
    "b": torch.randn(7).bfloat16(),
    "c": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "d": torch.randn(4, 2).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
}


def test_tensors_come_back_whole_in_part_and_in_another_dtype(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    with TensorReader(tmp_path, "model") as reader:
        assert sorted(reader.names()) == sorted(TENSORS)
        for name, x in TENSORS.items():
            read = reader.read(name)
            assert (reader.shape(name), reader.dtype(name)) == (x.shape, x.dtype)
            assert read.shape == x.shape and torch.equal(read.float(), x.float())
            assert torch.equal(reader.read(name, dtype=torch.float32), x.float())
        part = reader.read("a", (slice(1, 4), slice(0, 3), slice(2, 3)), torch.float16)
        assert torch.equal(part, TENSORS["a"][1:4, :, 2:3].half()) and part.is_contiguous()
        part[:] = 0  # the caller's own
        assert torch.equal(reader.read("a"), TENSORS["a"])


def _header(path, change):
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


def _move(header):
    header["b"]["data_offsets"] = [0, 14]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-3]), "its header describes"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "its header describes"),
        (lambda p: p.write_bytes(b"\x09"), "cannot hold its header"),
        (lambda p: p.write_bytes((1 << 60).to_bytes(8, "little") + b"{}"), "cannot hold"),
        (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"), "is damaged"),
        (lambda p: _header(p, _move), "the bytes of"),
        (lambda p: _header(p, lambda h: h["a"].update(shape=[1 << 40, 3])), "the bytes of a"),
        (lambda p: _header(p, lambda h: h["a"].update(shape=[-5, -12])), "negative"),
        (lambda p: _header(p, lambda h: h["a"].update(dtype="F4")), "the dtype 'F4'"),
        (lambda p: _header(p, lambda h: h["a"].pop("shape")), "is damaged"),
        (lambda p: p.unlink(), "No such file"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, damage, words):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    damage(path)
    with pytest.raises(UsageError, match=words) as error:
        TensorReader(tmp_path, "model")
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_an_index_is_that_of_its_files(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for name in ("a", "b"):
        save_file({name: TENSORS[name]}, tmp_path / f"model-{name}.safetensors")
    places = {"a": "model-a.safetensors", "b": "model-b.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    with TensorReader(tmp_path, "model") as reader:
        assert torch.equal(reader.read("b"), TENSORS["b"])
    for change, words in (
        ({"c": "model-a.safetensors"}, "puts c into model-a.safetensors, which does not hold it"),
        ({"c": "model-c.safetensors"}, "cannot read .*model-c.safetensors: No such file"),
        ({"c": "../other.safetensors"}, "is no index"),
        ({"c": 3}, "is no index"),
    ):
        index.write_text(json.dumps({"weight_map": {**places, **change}}))
        with pytest.raises(UsageError, match=words):
            TensorReader(tmp_path, "model")
    index.write_text("[]")
    with pytest.raises(UsageError, match="is no index"):
        TensorReader(tmp_path, "model")
    save_file({"a": TENSORS["a"]}, tmp_path / "model-b.safetensors")
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UsageError, match="a is in two files"):
        TensorReader(tmp_path, "model")
