"""Scores of models on worlds."""

import numpy as np
import pytest
import torch

from headway.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig
from headway.data.tokenizer import load_tokenizer
from headway.data.worlds.source import WorldSource
from headway.eval.worlds import score
from headway.hub.load import load_model
from headway.model.transformer import Transformer
from headway.train.loop import train

LAYER = MoEConfig(kind="multi_head_latent", n_heads=2, n_experts=8, top_k=2, d_expert=32)


@pytest.fixture(scope="module")
def source():
    spec = "world:mqar,pairs=3,length=20,vocab=24"
    return WorldSource.open(spec, load_tokenizer(spec))


def test_a_score_is_that_of_the_forward_pass(source, monkeypatch):
    model = Transformer(ModelConfig(vocab_size=64, n_layers=1, d_model=16, n_heads=2, moe=LAYER))
    result = score(model, 26, source, 30)
    rows = source.rows("test", np.arange(30, dtype=np.uint64), 20)
    nats, right, whole = 0.0, 0, 0
    for tokens, targets in zip(rows.tokens_BS, rows.targets_BS, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits_BSV[0, :, :26].double()
        asked = np.flatnonzero(targets >= 0)
        hits = [int(logits[t].argmax()) == targets[t] for t in asked]
        nats -= sum(float(logits[t].log_softmax(-1)[targets[t]]) for t in asked)
        right, whole = right + sum(hits), whole + all(hits)
    assert (result.items, result.targets) == (30, 90)
    assert result.accuracy == right / 90 and result.exact == whole / 30
    assert result.loss == pytest.approx(nats / 90, rel=1e-5)
    monkeypatch.setattr("headway.eval.worlds.LOGITS", 26 * 20 * 7)
    assert score(model, 26, source, 30).accuracy == result.accuracy


def test_floors_of_recall_are_what_chance_gives(source):
    model = Transformer(ModelConfig(vocab_size=64, n_layers=1, d_model=16, n_heads=2, moe=LAYER))
    floors = score(model, 26, source, 1000).floors
    assert floors.last_mentioned == pytest.approx(1 / 3, abs=0.04)
    assert floors.most_frequent == pytest.approx(1 / 12, abs=0.04)
    assert 1 / 12 < floors.bag_of_words < 0.45


@pytest.mark.parametrize(
    ("spec", "floors"),
    [
        ("s3,length=20", (1 / 6, 1 / 6 + 5 / 6 / 20, None)),
        ("parity,length=20", (1 / 2, 1 / 2, 1 / 2)),
        ("copy,length=14", (1 / 2, 1 / 2, 1 / 2)),
        ("multiplication,length=2", (None, None, None)),
        ("sums,length=2,language=1,languages=2", (1 / 10, 1 / 10, None)),
        ("facts,length=4,kind=attribute,agents=4", (1 / 32, None, None)),
    ],
)
def test_a_model_that_has_learned_nothing_is_no_better_than_chance(spec, floors):
    source = WorldSource.open(f"world:{spec}", load_tokenizer(f"world:{spec}"))
    size = len(source.world.words) + 2
    config = ModelConfig(
        vocab_size=-(-size // 64) * 64, n_layers=1, d_model=16, n_heads=2, moe=LAYER
    )
    result = score(Transformer(config), size, source, 600)
    assert result.accuracy < max(result.floors) + 0.1 and result.loss > 0.5
    for value, wanted in zip(result.floors, floors, strict=True):
        assert 0 <= value < 0.7 and (wanted is None or value == pytest.approx(wanted, abs=0.07))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "steps", "least"),
    [("copy,length=6", 60, 0.99), ("parity,length=12,running=1", 400, 0.9)],
)
def test_a_tiny_model_learns_what_no_guess_can(spec, steps, least, tmp_path):
    world = f"world:{spec}"
    config = Config(
        recipe="tiny",
        model=ModelConfig(n_layers=2, d_model=64, n_heads=4, moe=LAYER),
        data=DataConfig(source=(world,), seq_len=12, batch_size=64),
        optim=OptimConfig(name="muon", steps=steps, lr=5e-3),
        run=RunConfig(dir=str(tmp_path / "run"), sample_tokens=0),
    )
    train(config, log=lambda _: None)
    loaded = load_model(tmp_path / "run", dtype="float32")
    source = WorldSource.open(world, loaded.tokenizer)
    result = score(loaded.model, loaded.tokenizer.vocab_size, source, 500)
    assert result.accuracy > least > max(result.floors) + 0.25


@pytest.mark.slow
def test_two_layers_of_attention_learn_recall(tmp_path):
    """The command of docs/worlds.md: positions sharp enough for a value to see the key before."""
    world = "world:mqar,pairs=4,length=32"
    dense, rope = MoEConfig(kind="dense"), {"qk_norm": "none", "rope_theta": 100.0}
    config = Config(
        recipe="tiny",
        model=ModelConfig(n_layers=2, d_model=64, n_heads=4, d_ff=128, moe=dense, **rope),
        data=DataConfig(source=(world,), seq_len=32, batch_size=64),
        optim=OptimConfig(
            name="muon", steps=2000, lr=3e-3, muon_lr=0.01, beta2=0.99, warmup=0.05, decay=0.4
        ),
        run=RunConfig(dir=str(tmp_path / "run"), sample_tokens=0, eval_every=2000),
    )
    train(config, log=lambda _: None)
    loaded = load_model(tmp_path / "run", dtype="float32")
    source = WorldSource.open(world, loaded.tokenizer)
    result = score(loaded.model, loaded.tokenizer.vocab_size, source, 500)
    assert result.accuracy > 0.95 > max(result.floors) + 0.5
