"""Parameters in pieces (`mesh.shard`) equal one process in everything that training, evaluation,
sampling and checkpoints show."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headway import recipes
from headway.checkpoint.load import load_checkpoint
from headway.checkpoint.save import plan_save, write_checkpoint
from headway.checkpoint.state import parameter_of
from headway.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RouterConfig,
    UsageError,
)
from headway.config.check import validate
from headway.data.batch import Batch, micro_batches
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.eval.bits_per_byte import evaluate
from headway.eval.text import generate
from headway.eval.token_losses import TokenLosses
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers
from headway.parallel.mesh import fake
from headway.parallel.parallelize import parallelize
from headway.parallel.placement import to_local
from headway.serve.params import SamplingParams
from headway.train.objective import NextToken
from headway.train.step import gradient, update
from tests.parity.gathered import full_tensors
from tests.parity.test_parity import ROWS, Case, check, close, dense, flat, heads, rows_of

ADAMW = OptimConfig(lr=1e-3, clip=0.5)
MUON = OptimConfig(name="muon", lr=1e-3, clip=0.5)
optims = pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])


def fsdp(dp=1, hp=1, ep=1, **changes):
    return MeshConfig(dp, hp, ep, shard="fsdp", **changes)


def name(value):
    return f"{value.shard}-dp{value.dp}-hp{value.hp}-ep{value.ep}"


MESHES = [
    fsdp(2),
    fsdp(4),
    fsdp(2, 2),
    fsdp(1, 2, 2),
    fsdp(2, 2, 2),  # 8 ranks: more than a norm has rows, so that some pieces are empty
    MeshConfig(2, 1, 2, shard="hsdp"),
    MeshConfig(2, 2, 1, shard="hsdp"),
]


@optims
@pytest.mark.parametrize("mesh", MESHES, ids=name)
def test_multi_head(ranks, mesh, optim):
    check(ranks, Case(heads(), mesh, optim))


@optims
@pytest.mark.parametrize("mesh", [fsdp(2, 2), MeshConfig(2, 2, shard="hsdp")], ids=name)
def test_routers_that_read_the_token_and_micro_batches(ranks, mesh, optim):
    config = heads(router=RouterConfig(reads="token"))
    check(ranks, Case(config, mesh, optim, micro=2))


@optims
@pytest.mark.parametrize("mesh", [fsdp(2, 1, 2), MeshConfig(2, 1, 2, shard="hsdp")], ids=name)
def test_flat(ranks, mesh, optim):
    check(ranks, Case(flat(), mesh, optim, micro=2))


@optims
@pytest.mark.parametrize("d_expert", [8, 7], ids=["within_experts", "one_rank_has_all"])
def test_experts_that_do_not_divide(ranks, d_expert, optim):
    check(ranks, Case(flat(n_experts=7, d_expert=d_expert), fsdp(2), optim))


@optims
def test_dense(ranks, optim):
    check(ranks, Case(dense(), fsdp(4), optim, micro=2))


@pytest.mark.parametrize("mesh", [fsdp(2, 2, chunks=2), fsdp(2, 1, 2, chunks=2)], ids=name)
def test_chunks(ranks, mesh):
    check(ranks, Case(heads(), mesh, MUON))


def test_experts_without_tokens(ranks):
    check(ranks, Case(flat(), fsdp(2, 1, 2), MUON, skew=True))


def story(mesh, config, optim, data, folder, steps=3):
    """Trains, evaluates and samples after every step, saves; what people see of it, and the
    tensors of a second model that loaded the checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return _story(mesh, config, optim, data, folder, steps)


def _story(mesh, config, optim, data, folder, steps):
    tokenizer = load_tokenizer("bytes")
    stream = Stream(prepare(data, tokenizer, print), data, 0)
    model, parallelism, optimizers = build(mesh, config, optim)
    records, load = [], None
    for step in range(steps):
        tokens = TokenLosses()
        # shares that no rank count divides
        seen = evaluate(model, stream, 11, 3, parallelism, token_losses=tokens)
        params = SamplingParams(12, temperature=0.8, seed=step)
        text = generate(model, tokenizer, "ab", params, dispatcher=parallelism.dispatcher).text
        micro = 4 // mesh.size  # all ranks together always see four rows
        batch = stream.batch(step, mesh.rank, mesh.size, micro)
        micros = micro_batches(batch, micro, torch.device("cpu"))
        balance = config.moe.balance
        result = gradient(model, micros, NextToken(balance), parallelism, load=load)
        load = result.load
        update(model, optimizers, result, 1.0, optim, balance, parallelism)
        optimizers.zero_grad()
        assert seen.documents is not None
        uncopied = seen.documents.bits_per_byte_uncopied
        assert uncopied != seen.val_bits_per_byte
        assert seen.calibration is not None
        numbers = seen.val_loss, seen.val_bits_per_byte, uncopied, result.norm
        numbers += (seen.calibration.error, *(row["right"] for row in seen.calibration.bins()))
        spread = [*tokens.quantiles().values(), *(row["nats"] for row in tokens.by_position())]
        records.append((numbers, spread, text))
    folder = Path(folder) / f"{mesh.size}-{mesh.config.shard}"
    plan = plan_save(folder, steps, model, optimizers, config, {}, parallelism=parallelism)
    path = write_checkpoint(plan)
    for p in model.parameters():
        to_local(p).detach().zero_()
    again, parallelism, optimizers = build(mesh, config, optim)
    load_checkpoint(path, again, optimizers, config, parallelism.sharding)
    loaded = (
        full_tensors(dict(again.state_dict()), parallelism),
        full_tensors(optimizers.tensors(), parallelism, parameter=parameter_of),
    )
    held = sum(to_local(p).numel() for p in again.parameters())
    return records, str(path), loaded, held, mesh.traffic.take()


def build(mesh, config, optim):
    model = Transformer(config, Compute(dtype=torch.float64), seed=0).double()
    parallelism = parallelize(model, mesh)
    return model, parallelism, build_optimizers(model, optim, torch.float64, parallelism.sharding)


@pytest.mark.parametrize(
    ("mesh", "optim"),
    [(fsdp(2, 2), MUON), (fsdp(4), ADAMW), (MeshConfig(2, 1, 2, shard="hsdp"), MUON)],
    ids=lambda v: name(v) if isinstance(v, MeshConfig) else v.name,
)
def test_evaluation_samples_checkpoints(ranks, tmp_path, mesh, optim):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 70) % 11) for i in range(6000)))
    data = DataConfig(source=(str(text),), seq_len=16, batch_size=8, cache_dir=str(tmp_path))
    prepare(data, load_tokenizer("bytes"), print)
    config = dataclasses.replace(heads(), vocab_size=320)
    args = (config, optim, data, str(tmp_path))
    one = ranks.run(MeshConfig(), story, *args)[0]
    many = ranks.run(mesh, story, *args)
    files = [load_file(Path(one[1]) / f) for f in ("model.safetensors", "optimizer.safetensors")]
    for records, path, loaded, held, traffic in many:
        for mine, ones in zip(records, one[0], strict=True):
            (numbers, spread, sample), (expected, spread_of_one, text_of_one) = mine, ones
            for x, y in zip(numbers, expected, strict=True):
                close(x, y, "evaluation and norm")
            assert spread == pytest.approx(spread_of_one, rel=1e-6)  # losses are held in float32
            assert sample == text_of_one
        for file, reference, here in zip(
            ("model.safetensors", "optimizer.safetensors"), files, loaded, strict=True
        ):
            written = load_file(Path(path) / file)
            assert written.keys() == reference.keys() == here.keys()
            for key, value in reference.items():
                if value.numel():
                    close(written[key], value, f"{key} in {file}")
                assert torch.equal(written[key], here[key]), f"{key} after loading"
        assert held <= 0.55 * one[3]
        axis = "world" if mesh.shard == "fsdp" else "replica"
        assert traffic[f"{axis} fsdp all-gather"]["bytes"] > 0


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (MeshConfig(shard="fsdp"), "mesh.shard=fsdp shares parameters among ranks, and there is 1"),
        (MeshConfig(hp=2, shard="hsdp"), "mesh.shard=hsdp needs replicas, and dp=1"),
        (MeshConfig(dp=2, shard="hsdp"), "needs ranks to share among, and hp × ep=1"),
    ],
)
def test_nothing_to_share(mesh, words):
    config = dataclasses.replace(recipes.load("demo"), mesh=mesh)
    with pytest.raises(UsageError, match=words):
        validate(config)


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_a_model_for_512_ranks(kind):
    """Split and cut on the meta device, as rank 77 of 512 would see it."""
    moe = MoEConfig(
        kind="multi_head_latent", n_heads=8, n_experts=256, top_k=8, d_expert=2048, d_latent=4096
    )
    config = ModelConfig(
        vocab_size=128_000, n_layers=8, d_model=8192, n_heads=64, n_kv_heads=8, moe=moe
    )
    mesh_config = MeshConfig(8, 8, 8, shard=kind)
    with fake(mesh_config, rank=77) as mesh, torch.device("meta"):
        model = Transformer(config)
        total = sum(p.numel() for p in model.parameters())
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        parallelism = parallelize(model, mesh)
        optimizers = build_optimizers(model, MUON, torch.bfloat16, parallelism.sharding)
    here = sum(to_local(p).numel() for p in model.parameters())
    routers = sum(p.numel() for n, p in model.named_parameters() if ".router." in n)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    if kind == "fsdp":
        expected = (total - 8 * routers - norms) / 512 + routers + norms
    else:
        expected = experts / 64 + (total - experts - 8 * routers - norms) / 64 + routers + norms
    assert total > 50e9 and abs(here / expected - 1) < 1e-3
    assert optimizers.muon is not None
    cut = {len(p.shape) for p in optimizers.muon.shards}
    assert cut == {2}, "stacked experts are cut between matrices"


def bits(mesh, config, optim):
    """Three steps with matmuls in bfloat16: nats, gradients and parameters, whole."""
    model = Transformer(config, Compute(dtype=torch.bfloat16), seed=0)
    parallelism = parallelize(model, mesh)
    optimizers = build_optimizers(model, optim, torch.float32, parallelism.sharding)
    records, load = [], None
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        tokens, targets = torch.randint(32, (2, ROWS, 8), generator=generator)
        mine = rows_of(mesh, 8)
        batch = Batch(tokens[mine], targets[mine], None)
        balance = config.moe.balance
        result = gradient(model, [batch], NextToken(balance), parallelism, load=load)
        load = result.load
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        update(model, optimizers, result, 1.0, optim, balance, parallelism)
        optimizers.zero_grad()
        records.append((result.loss_sum, full_tensors(grads, parallelism)))
    return records, full_tensors(dict(model.state_dict()), parallelism)


@pytest.mark.parametrize("mesh", [MeshConfig(2), MeshConfig(1, 2), MeshConfig(1, 1, 2)], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_gathered_in_bfloat16_change_no_bit(ranks, mesh, tied):
    """Two ranks, one micro-batch each, so that the order of a sum is no matter."""
    config = dataclasses.replace(heads(d_shared=16), tied=tied)
    optim = OptimConfig(lr=1e-2, clip=0.0)  # the norm itself adds up in another order
    cut = dataclasses.replace(mesh, shard="fsdp")
    for (steps, last), (expected, end) in zip(
        *(ranks.run(m, bits, config, optim) for m in (cut, mesh)), strict=True
    ):
        for (nats, grads), (nats_whole, grads_whole) in zip(steps, expected, strict=True):
            assert nats == nats_whole
            for key, grad in grads_whole.items():
                assert torch.equal(grads[key], grad), key
        for key, value in end.items():
            assert torch.equal(last[key], value), key
