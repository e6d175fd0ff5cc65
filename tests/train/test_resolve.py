"""Derived values, their sentences, and what is refused; counted parameters and FLOPs."""

import dataclasses

import pytest
import torch

from headway.config import (
    BalanceConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RouterConfig,
    RunConfig,
    UsageError,
)
from headway.config.check import validate
from headway.kernels import attention
from headway.kernels.precision import native_bfloat16
from headway.model.transformer import Transformer
from headway.train.resolve import Sizes, resolve
from tests.kernels.cpp_paths import needs_native, switch_off


def test_open_values_are_filled_in_and_explained():
    config = Config(run=RunConfig(device="cpu"), optim=OptimConfig(steps=57))
    done = resolve(config, 257)
    assert done.config.model.vocab_size == 320
    assert done.config.data.micro_batch_size == 8
    assert (done.config.run.eval_every, done.config.run.sample_every) == (5, 10)
    assert done.config.run.checkpoint_every == 5  # a crash costs no more than what was evaluated
    assert done.derived["run.eval_every"] == "5: a tenth of 57 steps"
    assert done.dtype == (torch.bfloat16 if native_bfloat16(done.device) else torch.float32)
    config_values = validate(config)
    assert config_values and done.derived.items() >= config_values.items()
    again = resolve(done.config, 257)
    assert again.config == done.config
    assert set(again.derived) - {*config_values, "kernels"} == {"run.dtype"}


def test_the_capacity_is_that_of_a_sequence(monkeypatch):
    """Said before step 0, and chunks that nobody gave cut no sequence."""
    flat = MoEConfig(kind="moe", n_experts=8, top_k=2, capacity_factor=1.25)
    done = resolve(_changed(model=ModelConfig(moe=flat)), 257)
    assert done.derived["model.moe.capacity_factor"] == (
        "1.25: an expert takes at most 80 rows of a sequence of 256 tokens; samples drop none"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    spans = _changed(mesh=MeshConfig(ep=4), model=ModelConfig(moe=flat))
    assert resolve(spans, 257).config.mesh.chunks == 2  # two rows in a micro-batch
    one_row = dataclasses.replace(spans, data=DataConfig(micro_batch_size=1))
    done = resolve(one_row, 257)
    assert done.config.mesh.chunks == 1
    assert "capacity_factor=1.25 counts by sequence" in done.derived["mesh.chunks"]


def test_chunks_follow_the_nodes(monkeypatch):
    """As `headway plan` has it; one process has nothing to choose, and a given number stays."""
    flat = MoEConfig(kind="moe", n_experts=8, top_k=2)
    config = _changed(mesh=MeshConfig(ep=4), model=ModelConfig(moe=flat))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    done = resolve(config, 257)
    assert done.config.mesh.chunks == 2
    assert done.derived["mesh.chunks"].startswith("2: ep=4 spans nodes")
    given = dataclasses.replace(config, mesh=MeshConfig(ep=4, chunks=1))
    assert resolve(given, 257).config.mesh.chunks == 1
    gathers = dataclasses.replace(config, mesh=MeshConfig(ep=4, ep_scheme="all_gather"))
    assert resolve(gathers, 257).derived["mesh.chunks"] == "1: ep=4 uses all-gather"
    fsdp = dataclasses.replace(config, mesh=MeshConfig(dp=2, ep=2, shard="fsdp"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert resolve(fsdp, 257).derived["mesh.chunks"].startswith("1: fsdp would gather")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resolve(config, 257).derived["mesh.chunks"] == "1: ep=4 is within a node"
    assert "mesh.chunks" not in resolve(_changed(), 257).derived


def _changed(**parts):
    return dataclasses.replace(Config(run=RunConfig(device="cpu")), **parts)


@pytest.mark.parametrize(
    "config, words",
    [
        (_changed(data=DataConfig(micro_batch_size=3)), "micro_batch_size=3 .*batch_size=8"),
        (
            _changed(model=ModelConfig(vocab_size=100)),
            "model.vocab_size=100 is below the tokenizer's 257",
        ),
        (_changed(mesh=MeshConfig(hp=2)), "mesh .*hp=2"),
        (_changed(run=RunConfig(log_every=0)), "run.log_every=0 is below 1"),
        (_changed(run=RunConfig(eval_every=-1)), "run.eval_every=-1"),
        (_changed(optim=OptimConfig(decay=0.0)), "optim.decay=0.0"),
    ],
)
def test_values_that_cannot_work_are_refused(config, words):
    with pytest.raises(UsageError, match=words):
        resolve(config, 257)


def test_remarks_on_the_config_are_notes_and_errors_when_strict():
    both = ModelConfig(moe=MoEConfig(balance=BalanceConfig(bias="sign", aux=0.01)))
    (note,) = resolve(_changed(model=both), 257).notes
    assert "aux=0.01 both even out the load" in note
    with pytest.raises(UsageError, match="run.strict: model.moe.balance.bias=sign and aux=0.01"):
        resolve(_changed(model=both, run=RunConfig(device="cpu", strict=True)), 257)


@pytest.mark.skipif(native_bfloat16(torch.device("cpu")), reason="this CPU multiplies bfloat16")
def test_emulated_bfloat16_is_told_and_refused_when_strict():
    run = RunConfig(device="cpu", dtype="bfloat16")
    done = resolve(_changed(run=run), 257)
    assert done.dtype == torch.bfloat16 and done.newton_schulz_dtype == torch.float32
    assert "emulated" in done.remarks[0]
    with pytest.raises(UsageError, match="run.strict: run.dtype=bfloat16 is emulated"):
        resolve(_changed(run=dataclasses.replace(run, strict=True)), 257)


@needs_native
def test_windows_and_documents_that_take_a_dense_mask_are_told_and_refused(monkeypatch):
    windowed, run = ModelConfig(window=(64, 0)), RunConfig(device="cpu", dtype="float32")
    documents = DataConfig(doc_mask=True)
    assert not _slow_masks(_changed(model=windowed, data=documents, run=run))
    switch_off(monkeypatch, attention)
    wide = ModelConfig(window=(256,))  # S: every position sees all before it
    assert not _slow_masks(_changed(model=wide, run=run))
    (remark,) = _slow_masks(_changed(model=windowed, run=run))
    assert remark.startswith(
        "model.window=(64, 0): attention on this cpu takes a mask of 256 × 256"
    )
    config = _changed(data=documents, run=dataclasses.replace(run, strict=True))
    with pytest.raises(UsageError, match="run.strict: .*data.doc_mask: attention"):
        resolve(config, 257)


def _slow_masks(config: Config) -> list[str]:
    return [remark for remark in resolve(config, 257).remarks if "takes a mask" in remark]


def test_routers_that_leave_the_kernels_are_told():
    run = RunConfig(device="cpu", dtype="float32")

    def slow(**options) -> list[str]:
        moe = MoEConfig(router=RouterConfig(**options))
        done = resolve(_changed(model=ModelConfig(moe=moe), run=run), 257)
        return [remark for remark in done.remarks if "router" in remark]

    assert slow() == slow(logit_bias=True) == []
    (remark,) = slow(n_groups=8, top_k_groups=2)
    assert "model.moe.router.n_groups=8: groups are selected by PyTorch's operators" in remark


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told():
    with pytest.raises(UsageError, match="run.device=cuda"):
        resolve(_changed(run=RunConfig(device="cuda")), 257)


def test_counts_of_a_small_model():
    moe = MoEConfig(n_heads=2, n_experts=8, top_k=3, d_expert=5, n_dense_layers=1)
    config = ModelConfig(vocab_size=64, n_layers=2, d_model=16, n_heads=2, d_ff=10, moe=moe)
    model = Transformer(config)
    sizes = Sizes.of(model, 32)
    total, active = sizes.total, sizes.active
    experts = 2 * 8 * 3 * 5 * 8  # heads, experts, matrices, F, L
    assert total - active == experts * 5 // 8
    dense = 3 * 16 * 10
    sparse = 2 * 16 * 16 + 2 * 8 * 8 + experts * 3 // 8
    matrices = 2 * 4 * 16 * 16 + dense + sparse + 64 * 16
    norms = 2 * 2 * 16 + 16 + 2 * 2 * 8 + 16  # of the blocks, the end, QK-norm, the latent
    assert active == matrices + norms + 64 * 16
    # a position of a causal layer sees (S+1)/2 keys on average, itself included
    assert sizes.flops_per_token == 6 * matrices + 12 * 16 * 2 * 16.5
    windowed = Transformer(dataclasses.replace(config, window=(4, 0)))
    keys = sum(min(i, 4) for i in range(1, 33)) / 32
    flops = Sizes.of(windowed, 32).flops_per_token
    assert flops == 6 * matrices + 12 * 16 * (keys + 16.5)


def test_rates_by_the_tokens_of_a_run_are_resolved_once():
    """A resumed run has them in its config, and takes them as they are."""
    data = DataConfig(seq_len=128, batch_size=32)
    config = Config(data=data, optim=OptimConfig(steps=5000, lr=1e-3, transfer="power"))
    done = resolve(config, 257)
    assert done.config.data.batch_size == round(32 * 10**0.383) == 77
    assert done.config.data.micro_batch_size == 77 and done.config.run.eval_every == 207
    assert done.config.optim.lr == pytest.approx(1e-3 * (77 / 32) ** 0.5)
    assert done.derived["optim.lr"].startswith("0.001551: 0.001 · √(B/B0) = √2.406")
    again = resolve(done.config, 257)
    assert again.config == done.config and "optim.lr" not in again.derived
    longer = dataclasses.replace(done.config.optim, steps=9000)
    assert (
        resolve(dataclasses.replace(done.config, optim=longer), 257).config.optim.lr
        == done.config.optim.lr
    )


def test_the_new_batch_is_checked_too():
    short = OptimConfig(steps=8, transfer="power", base_tokens=10**9)
    moe = MoEConfig(n_heads=2, balance=BalanceConfig(aux_scope="sequence"))
    config = Config(
        model=ModelConfig(d_model=64, n_heads=2, moe=moe),
        mesh=MeshConfig(hp=2, chunks=4),
        optim=short,
    )
    validate(config)
    with pytest.raises(
        UsageError, match="mesh.chunks=4 cuts sequences, of which a micro-batch has 1"
    ):
        resolve(config, 257)
