"""Budgets, branches and clocks of bench/learn.py, with a model of a few hundred weights."""

from dataclasses import replace

import pytest
import torch

from bench.learn import Budget, Sparse, trainer
from bench.texts import Characters, StreamText
from headway.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RunConfig,
    UsageError,
)
from headway.data.batch import micro_batches
from headway.data.tokenizer import load_tokenizer
from headway.optim.schedule import lr_factor
from headway.train.objective import NextToken
from headway.train.open_session import open_session
from headway.train.resolve import resolve
from headway.train.step import gradient, update
from headway.train.text_data import load_text

MODEL = ModelConfig(
    n_layers=1,
    d_model=16,
    n_heads=2,
    moe=MoEConfig(kind="multi_head_latent", n_heads=2, n_experts=4, top_k=2, d_expert=8),
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return Characters(path, batch_size=2, seq_len=16, seed=1)


@pytest.fixture
def config(text):
    return Config(
        model=replace(MODEL, vocab_size=text.vocab_size),
        optim=OptimConfig(name="muon", lr=1e-2, warmup=0.1, decay=0.5),
    )


def test_a_run_in_steps_learns_and_is_repeatable(config, text):
    first, second = (
        trainer(config, text).advance(Budget(steps=20), evaluations=2) for _ in range(2)
    )
    assert [p.step for p in first] == [10, 20]
    assert first[1].nats < first[0].nats
    assert [p.nats for p in first] == [p.nats for p in second]


def test_a_run_in_seconds_ends_soon_after_its_budget(config, text):
    last = trainer(config, text).advance(Budget(cpu_seconds=0.2))[-1]
    assert 0.2 <= last.cpu_seconds < 2.0


def test_a_branch_off_the_trunk_equals_a_run_of_its_own(config, text):
    """Same rates, same batches: the trunk is only shared work."""
    budget = Budget(steps=20)
    alone = trainer(config, text)
    alone.hold(2, until=lambda: alone.step >= 10)
    alone.advance(budget)
    trunk = trainer(config, text)
    trunk.hold(2, until=lambda: trunk.step >= 10)
    branch = trunk.fork()
    trunk.hold(2, until=lambda: trunk.step >= 15)
    assert branch.advance(budget)[-1].nats == alone.curve[-1].nats
    for a, b in zip(branch.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_validation_covers_the_same_characters_at_every_context(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + (i * i) % 26) for i in range(20_000)))
    short, long = (Characters(path, 2, seq_len).val() for seq_len in (64, 128))
    assert torch.equal(
        torch.cat([y.flatten() for _, y in short]), torch.cat([y.flatten() for _, y in long])
    )


def test_a_missing_text_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="is no file"):
        Characters(tmp_path / "none.txt", 2, 8)


@pytest.mark.parametrize("kind", ["dense", "moe", "multi_head_latent"])
def test_a_session_takes_the_same_steps_to_the_bit(tmp_path, kind):
    """With the same rates, and an even load before the first step, which is where the two differ."""
    config = session_config(tmp_path, kind)
    resolved = resolve(config, 257)
    optim, balance = resolved.config.optim, resolved.config.model.moe.balance
    rates = [lr_factor(step, optim) for step in range(optim.steps)]
    texts = StreamText(resolved.config.data, seed=config.run.seed)
    bench = trainer(resolved.config, texts, seed=config.run.seed)
    if kind != "dense":
        assert isinstance(bench.loss, Sparse)
        bench.loss.load = [torch.ones_like(m.router.bias_HE) for m in bench.model.sparse_layers()]
    for rate in rates:
        bench._step(rate)
    tokenizer = load_tokenizer("bytes")
    with open_session(resolved, tokenizer, load_text, log=lambda _: None) as session:
        objective = NextToken(balance)
        while session.begin_step():
            batch = session.data.stream.batch(session.progress.step)
            parts = micro_batches(batch, config.data.batch_size, torch.device("cpu"))
            result = gradient(session.model, parts, objective, load=session.progress.load)
            update(session.model, session.optimizers, result, session.lr_factor, optim, balance)
            session.end_step(result)
    for a, b in zip(session.model.parameters(), bench.model.parameters(), strict=True):
        assert torch.equal(a, b)


def session_config(root, kind):
    path = root / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 1000)
    heads = 2 if kind == "multi_head_latent" else 1
    model = replace(MODEL, moe=replace(MODEL.moe, kind=kind, n_heads=heads), vocab_size=320)
    return Config(
        model=model,
        data=DataConfig((str(path),), seq_len=16, batch_size=2, cache_dir=str(root / "cache")),
        optim=OptimConfig(name="muon", steps=12, lr=1e-2, warmup=0.1, decay=0.5),
        run=RunConfig(dir=str(root / "run"), seed=3, device="cpu", eval_tokens=0, sample_tokens=0),
    )
