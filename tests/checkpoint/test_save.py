"""Round trips, damage, a full disk, a kill at any moment."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headway.checkpoint import checkpoint_dir, load, save
from headway.checkpoint.checkpoint_dir import CheckpointError, latest
from headway.checkpoint.tensor_files import TensorFile, plan_files
from headway.checkpoint.tensor_reader import TensorReader
from headway.config import ModelConfig, MoEConfig, OptimConfig, UsageError
from headway.model.linear import Embedding, Linear
from headway.model.roles import Group, Role
from headway.optim.groups import build_optimizers
from headway.parallel.local_shards import local_shard
from headway.parallel.parallelize import SINGLE_PROCESS

CONFIG = ModelConfig(vocab_size=64, d_model=128)


class Biased(nn.Linear):
    def roles(self):
        return {"weight": Role(Group.MATRIX), "bias": Role(Group.VECTOR)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = Embedding(50, 16)
        self.body = Biased(16, 16)
        self.head = Linear(16, 50, head=True)
        nn.init.normal_(self.head.weight)
        self.head.weight = self.embed.weight  # tied: one tensor, two names
        self.register_buffer("bias_HE", torch.zeros(2, 4))
        self.register_buffer("angles", torch.zeros(3), persistent=False)

    def roles(self):
        return {"bias_HE": Role(Group.ROUTER), "angles": Role(Group.ROUTER)}


def _trained(steps=2, seed=0):
    torch.manual_seed(seed)
    model = Net()
    optimizers = build_optimizers(model, OptimConfig(name="muon"))
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizers.step()
    model.bias_HE += torch.randn(2, 4)
    return model, optimizers


def _save(run, step, model, optimizers, keep=2, state=None):
    plan = save.plan_save(run, step, model, optimizers, CONFIG, state or {}, keep)
    return save.write_checkpoint(plan)


def _names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_round_trip_is_exact(tmp_path):
    model, optimizers = _trained()
    state = {"spike": {"mean": 0.1 + 0.2}, "best": None}
    path = _save(tmp_path, 60, model, optimizers, state=state)
    assert path == tmp_path / "checkpoints" / "step-000060"
    drawn = torch.randn(4)
    other, others = _trained(seed=1)
    newest, problems = latest(tmp_path)
    assert (newest, problems) == (path, [])
    back = load.load_checkpoint(path, other, others, CONFIG)
    assert back["spike"] == state["spike"] and back["step"] == 60 and back["updates"] == 2
    assert torch.equal(torch.randn(4), drawn)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = optimizers.tensors(), others.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert others.adamw.updates == 2


def test_files_are_plain_safetensors_with_names_of_parameters(tmp_path):
    path = _save(tmp_path, 1, *_trained())
    weights = load_file(path / "model.safetensors")
    assert set(weights) == {"embed.weight", "body.weight", "body.bias", "bias_HE"}
    assert all(t.dtype == torch.float32 for t in weights.values())
    header = (path / "model.safetensors").read_bytes()[8:200]
    assert b'"__metadata__":{"format":"pt"}' in header
    assert set(load_file(path / "optimizer.safetensors")) == {
        "embed.weight.exp_avg",
        "embed.weight.exp_avg_sq",
        "body.bias.exp_avg",
        "body.bias.exp_avg_sq",
        "body.weight.momentum",
    }
    assert load.read_model_config(path) == CONFIG


def test_the_files_are_those_of_safetensors_byte_for_byte(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
    tensors = {f"b.{i}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"a.ü": torch.tensor([True, False, True]), "empty": torch.zeros(0, 4)}
    tensors |= {
        "scalar": torch.tensor(2.0),
        "turned": torch.randn(4, 6).T,
        "u": torch.ones(3).byte(),
    }
    pieces = {name: local_shard(name, x, SINGLE_PROCESS.sharding) for name, x in tensors.items()}
    [file] = plan_files("model", pieces)
    file.create(tmp_path)
    file.write(tmp_path, {name: [shard] for name, shard in pieces.items()})
    contiguous = {name: x.contiguous() for name, x in tensors.items()}
    save_file(contiguous, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == theirs


def test_large_files_are_several_with_an_index(tmp_path):
    model, optimizers = _trained()
    snapshot = save.plan_save(tmp_path, 1, model, optimizers, CONFIG, {}, max_file_bytes=3250)
    path = save.write_checkpoint(snapshot)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert [p.name for p in sorted(path.glob("model-*"))] == names
    assert checkpoint_dir.verify(path) == ""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["embed.weight"] == names[0] != index["weight_map"]["body.weight"]
    assert index["metadata"]["total_size"] == sum(
        x.numel() * 4 for n, x in model.state_dict().items() if n != "head.weight"
    )
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(path / file)[name], model.state_dict()[name])
    other, others = _trained(seed=1)
    load.load_checkpoint(path, other, others, CONFIG)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    with TensorReader(path, "model") as reader:
        part = reader.read("embed.weight", (slice(10, 20), slice(4, 8)))
    assert torch.equal(part, model.embed.weight[10:20, 4:8])


def test_only_the_newest_are_kept(tmp_path):
    model, optimizers = _trained()
    for step in (999_999, 1_000_000, 1_000_001):
        _save(tmp_path, step, model, optimizers, keep=2)
    assert _names(tmp_path) == ["step-1000000", "step-1000001"]
    _save(tmp_path, 1_000_001, model, optimizers, keep=1)  # written again after a resume
    assert _names(tmp_path) == ["step-1000001"]


def _truncate(path):
    os.truncate(path / "model.safetensors", 100)


def _flip(path):
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    "damage, words",
    [
        (_truncate, "model.safetensors has 100 bytes instead of"),
        (_flip, "optimizer.safetensors does not match its SHA-256"),
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text('{"files": {'), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda p: (p / "config.json").write_text("{}"), "config.json has 2 bytes"),
    ],
)
def test_damage_is_named_and_the_previous_one_is_used(tmp_path, damage, words):
    model, optimizers = _trained()
    good = _save(tmp_path, 10, model, optimizers)
    bad = _save(tmp_path, 20, model, optimizers)
    damage(bad)
    newest, problems = latest(tmp_path)
    assert newest == good
    assert (
        len(problems) == 1
        and problems[0].startswith("step-000020 is damaged")
        and words in problems[0]
    )
    assert checkpoint_dir.set_aside_after(tmp_path, 10) == ["step-000020.damaged"]
    assert latest(tmp_path) == (good, [])


def test_nothing_to_find(tmp_path):
    assert latest(tmp_path) == (None, [])


def test_another_architecture_is_refused_by_its_first_field(tmp_path):
    model, optimizers = _trained()
    path = _save(tmp_path, 1, model, optimizers)
    wanted = dataclasses.replace(CONFIG, d_model=256, moe=MoEConfig(top_k=3))
    with pytest.raises(UsageError) as caught:
        load.load_checkpoint(path, model, optimizers, wanted)
    assert str(caught.value).startswith(
        "resume: model.d_model is 128 in the checkpoint and 256 in the recipe; "
    )
    inner = dataclasses.replace(CONFIG, moe=MoEConfig(top_k=3))
    with pytest.raises(
        UsageError, match="model.moe.top_k is 4 in the checkpoint and 3 in the recipe"
    ):
        load.load_checkpoint(path, model, optimizers, inner)


def test_other_tensors_are_refused(tmp_path):
    model, optimizers = _trained()
    path = _save(tmp_path, 1, model, optimizers)
    with pytest.raises(UsageError, match="bias is only in"):
        load.load_weights(path, nn.Linear(2, 2))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 KiB, where mounting is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip("mounting needs more rights")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(small_disk):
    model, optimizers = _trained()
    good = _save(small_disk, 10, model, optimizers)
    (small_disk / "filler").write_bytes(b"x" * 20_000)
    with pytest.raises(CheckpointError, match="step 20 was not written: .*[Nn]o space left"):
        _save(small_disk, 20, model, optimizers)
    assert _names(small_disk) == ["step-000010"]
    assert latest(small_disk) == (good, [])
    (small_disk / "filler").unlink()
    assert latest(small_disk)[0] != _save(small_disk, 20, model, optimizers)


FILES = ("model.safetensors", "config.json", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("file", FILES)
def test_an_error_in_any_file_leaves_the_previous_checkpoint(tmp_path, monkeypatch, file):
    model, optimizers = _trained()
    good = _save(tmp_path, 10, model, optimizers)
    real_write, real_json = TensorFile.write, checkpoint_dir.write_json

    def torn(path):
        path.write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    def write(self, folder, pieces):
        return torn(folder / file) if self.name == file else real_write(self, folder, pieces)

    def write_json(path, value):
        return torn(path) if path.name == file else real_json(path, value)

    monkeypatch.setattr(TensorFile, "write", write)
    monkeypatch.setattr(checkpoint_dir, "write_json", write_json)
    with pytest.raises(CheckpointError, match="No space left"):
        _save(tmp_path, 20, model, optimizers)
    assert _names(tmp_path) == ["step-000010"]
    assert latest(tmp_path) == (good, [])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the place of the folder")
    with pytest.raises(CheckpointError, match="checkpoint at step 1 was not written"):
        _save(tmp_path, 1, *_trained())


def test_kill_between_the_two_renames_of_a_replacement(tmp_path):
    model, optimizers = _trained()
    path = _save(tmp_path, 10, model, optimizers)
    os.replace(path, path.with_name("step-000010.replaced"))
    newest, problems = latest(tmp_path)
    assert newest is not None and newest.name == "step-000010.replaced" and problems == []
    assert checkpoint_dir.verify(newest) == ""
    _save(tmp_path, 10, model, optimizers)
    assert _names(tmp_path) == ["step-000010"]


def test_kill_after_the_two_renames_of_a_replacement(tmp_path):
    model, optimizers = _trained()
    path = _save(tmp_path, 10, model, optimizers)
    shutil.copytree(path, path.with_name("step-000010.replaced"))
    assert _save(tmp_path, 10, model, optimizers) == path
    assert _names(tmp_path) == ["step-000010"] and checkpoint_dir.verify(path) == ""


def test_kill_at_random_moments_always_leaves_a_whole_checkpoint(tmp_path):
    model, optimizers = _trained()
    drawn = random.Random(0)
    start, killed_while_writing = 1, 0
    model.bias_HE.fill_(start)
    _save(tmp_path, start, model, optimizers)
    for _ in range(25):
        child = os.fork()
        if child == 0:
            try:
                for step in range(start, start + 10_000):
                    model.bias_HE.fill_(step)
                    _save(tmp_path, step, model, optimizers, state={"mark": step})
            finally:
                os._exit(1)
        time.sleep(drawn.uniform(0.01, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        killed_while_writing += any(name.startswith(".tmp-step") for name in _names(tmp_path))
        newest, problems = latest(tmp_path)
        assert newest is not None and problems == []
        other, others = _trained(seed=1)
        start = load.load_checkpoint(newest, other, others, CONFIG)["step"]
        assert (other.bias_HE == start).all()  # all of it is of one step
        assert json.loads((newest / "state.json").read_text())["step"] == start
    assert killed_while_writing > 0
    _save(tmp_path, start + 1, model, optimizers)
    assert not [name for name in _names(tmp_path) if name.startswith(".tmp")]
