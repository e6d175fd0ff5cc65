"""A run saved on one mesh goes on with another: the same loss, the same files; on the same mesh the
same bits."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from headway.checkpoint import checkpoint_dir
from headway.checkpoint.checkpoint_dir import CheckpointError
from headway.checkpoint.load import load_checkpoint
from headway.checkpoint.save import plan_save, write_checkpoint
from headway.checkpoint.tensor_files import TensorFile
from headway.config import BalanceConfig, MeshConfig, OptimConfig, RouterConfig
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers
from headway.parallel.parallelize import parallelize
from headway.train.interval import SpikeDetector
from headway.train.objective import NextToken
from headway.train.progress import Progress
from headway.train.step import gradient, update
from tests.parity.test_parity import ROWS, close, heads

ONE = MeshConfig()
CHAIN = (
    MeshConfig(hp=4),
    MeshConfig(hp=2, ep=2),
    MeshConfig(dp=2, ep=2, shard="fsdp"),
    ONE,
    MeshConfig(dp=2, hp=2, shard="hsdp"),
    MeshConfig(dp=2, hp=2),
)


def config(noisy=False, bias: Literal["none", "sign"] = "sign"):
    return heads(
        router=RouterConfig(noisy=noisy), balance=BalanceConfig(aux=0.05, bias=bias, bias_rate=0.1)
    )


def batches(mesh, step):
    from headway.data.batch import Batch, micro_batches

    generator = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(32, (2, ROWS, 8), generator=generator)
    each = ROWS // mesh.size
    mine = slice(mesh.rank * each, (mesh.rank + 1) * each)
    batch = Batch(tokens[mine], targets[mine], None)
    return micro_batches(batch, each, torch.device("cpu"))


def go_on(mesh, folder, first, last, model, optim, save_at=()):
    """Steps first … last − 1 after the newest checkpoint, on this rank; loss and norm of each."""
    net = Transformer(model, Compute(dtype=torch.float64), seed=0).double()
    parallelism = parallelize(net, mesh)
    optimizers = build_optimizers(net, optim, torch.float64, parallelism.sharding)
    torch.manual_seed(mesh.rank)
    progress = Progress(SpikeDetector(0.0))
    if first:
        path, _ = checkpoint_dir.latest(Path(folder))
        assert path is not None and path.name == f"step-{first:06d}"
        torch.manual_seed(1234)
        state = load_checkpoint(path, net, optimizers, model, parallelism.sharding)
        progress.restore(state["progress"])
    records = []
    for step in range(first, last):
        micros = batches(mesh, step)
        result = gradient(
            net, micros, NextToken(model.moe.balance), parallelism, load=progress.load
        )
        progress.load = result.load
        records.append((result.loss, result.norm))
        update(net, optimizers, result, 1.0, optim, model.moe.balance, parallelism)
        optimizers.zero_grad()
        if step + 1 in save_at:
            state = {"progress": progress.to_dict()}
            write_checkpoint(
                plan_save(Path(folder), step + 1, net, optimizers, model, state, 9, parallelism)
            )
    return records


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_every_mesh_goes_on_where_another_stopped(ranks, tmp_path, optim, tied):
    optim = OptimConfig(name=optim, lr=1e-3, clip=0.5)
    model = dataclasses.replace(config(), tied=tied)
    reference = ranks.run(ONE, go_on, tmp_path / "one", 0, 2 * len(CHAIN), model, optim, (6,))[0]
    records = []
    for i, mesh in enumerate(CHAIN):
        at = 2 * i
        answers = ranks.run(mesh, go_on, tmp_path / "many", at, at + 2, model, optim, (at + 2,))
        assert all(answer == answers[0] for answer in answers)
        records += answers[0]
    for step, (a, b) in enumerate(zip(records, reference, strict=True)):
        for x, y, what in zip(a, b, ("loss", "norm"), strict=True):
            close(x, y, f"{what} of step {step}")
    one, many = (
        checkpoint_dir.checkpoints(tmp_path / name) / "step-000006" for name in ("one", "many")
    )
    for file in ("model.safetensors", "optimizer.safetensors"):
        # names, shapes, places: the header, byte for byte
        a, b = ((path / file).read_bytes() for path in (one, many))
        n = int.from_bytes(a[:8], "little") + 8
        assert a[:n] == b[:n] and len(a) == len(b), file
    assert (one / "config.json").read_bytes() == (many / "config.json").read_bytes()


def resave(mesh, source, target, model, optim):
    """Loads a checkpoint and writes it again."""
    net = Transformer(model, Compute(dtype=torch.float64), seed=1).double()
    parallelism = parallelize(net, mesh)
    optimizers = build_optimizers(net, optim, torch.float64, parallelism.sharding)
    path, _ = checkpoint_dir.latest(Path(source))
    assert path is not None
    load_checkpoint(path, net, optimizers, model, parallelism.sharding)
    write_checkpoint(plan_save(Path(target), 2, net, optimizers, model, {}, 9, parallelism))


@pytest.mark.parametrize("mesh", [MeshConfig(hp=4), MeshConfig(2, 2, 2)], ids=str)
def test_the_files_of_every_mesh_are_the_same_byte_for_byte(ranks, tmp_path, mesh):
    model, optim = config(), OptimConfig(name="muon", lr=1e-3)
    ranks.run(ONE, go_on, tmp_path / "one", 0, 2, model, optim, (2,))
    ranks.run(mesh, resave, tmp_path / "one", tmp_path / "many", model, optim)
    one, many = (checkpoint_dir.latest(tmp_path / name)[0] for name in ("one", "many"))
    assert one and many
    manifests = [json.loads((path / "manifest.json").read_text())["files"] for path in (one, many)]
    assert manifests[0].keys() == manifests[1].keys()
    assert [k for k in manifests[0] if manifests[0][k] != manifests[1][k]] == ["state.json"]
    state = json.loads((many / "state.json").read_text())
    assert state["mesh"] == {"dp": mesh.dp, "hp": mesh.hp, "ep": mesh.ep}


def test_on_the_same_mesh_the_bits_are_the_same(ranks, tmp_path):
    """With noise in the routers, which is drawn by every rank for itself."""
    mesh, model, optim = MeshConfig(hp=2, ep=2), config(noisy=True), OptimConfig(lr=1e-3)
    whole = ranks.run(mesh, go_on, tmp_path, 0, 4, model, optim, (2,))
    again = ranks.run(mesh, go_on, tmp_path, 2, 4, model, optim)
    assert again == [records[2:] for records in whole]
    (checkpoint_dir.checkpoints(tmp_path) / "step-000002" / "manifest.json").unlink()
    assert ranks.run(mesh, go_on, tmp_path, 0, 4, model, optim) == whole


def fails_once(mesh, folder, model, optim):
    """Rank 1 has no space at its first save; what every rank saw."""
    net = Transformer(model, Compute(dtype=torch.float64), seed=0).double()
    parallelism = parallelize(net, mesh)
    optimizers = build_optimizers(net, optim, torch.float64, parallelism.sharding)
    write, seen = TensorFile.write, []

    def full(self, folder, pieces):
        raise OSError(28, "No space left on device")

    def save(step):
        try:
            write_checkpoint(
                plan_save(Path(folder), step, net, optimizers, model, {}, 9, parallelism)
            )
        except CheckpointError as error:
            seen.append(str(error))

    save(1)
    try:
        if mesh.rank == 1:
            TensorFile.write = full
        save(2)
    finally:
        TensorFile.write = write
    newest = checkpoint_dir.latest(Path(folder))
    mesh.barrier()
    save(3)
    return seen, newest


def test_a_rank_that_cannot_write_fails_the_save_and_not_the_run(ranks, tmp_path):
    text = "checkpoint at step 2 was not written: rank 1: [Errno 28] No space left on device"
    answers = ranks.run(MeshConfig(hp=2), fails_once, tmp_path, config(), OptimConfig())
    for seen, newest in answers:
        assert seen == [text]
        assert newest == (checkpoint_dir.checkpoints(tmp_path) / "step-000001", [])
    assert checkpoint_dir.latest(tmp_path) == (
        checkpoint_dir.checkpoints(tmp_path) / "step-000003",
        [],
    )
    names = {path.name for path in checkpoint_dir.checkpoints(tmp_path).iterdir()}
    assert names == {"step-000001", "step-000003"}
