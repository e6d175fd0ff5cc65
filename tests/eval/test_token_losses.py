import numpy as np
import pytest
import torch

from headway.config import ModelConfig, MoEConfig
from headway.eval.bits_per_byte import evaluate
from headway.eval.token_losses import TokenLosses
from headway.model.transformer import Transformer
from tests.data.worlds.test_world import stream


def test_positions_and_quantiles_by_hand():
    token_losses = TokenLosses()
    nats = torch.arange(18.0).reshape(2, 9)
    targets = torch.ones(2, 9, dtype=torch.int64)
    targets[1, 8] = -1
    token_losses.add(nats[:1], targets[:1])
    token_losses.add(nats[1:], targets[1:])
    rows = [tuple(row.values()) for row in token_losses.by_position()]
    assert rows == [(0, 0, 4.5, 2), (1, 1, 5.5, 2), (2, 3, 7.0, 4), (4, 7, 10.0, 8), (8, 8, 8.0, 1)]
    quantiles = token_losses.quantiles()
    assert list(quantiles) == ["50", "90", "99", "99.9", "max"]
    wanted = np.percentile(np.arange(17.0), [50, 90, 99, 99.9])
    assert list(quantiles.values()) == pytest.approx([*wanted, 16.0])
    assert token_losses.sentences()[0].endswith("max 16.00")
    first, second, third = TokenLosses(), TokenLosses(), TokenLosses()
    second.add(nats[:1], targets[:1])
    third.add(nats[1:], targets[1:])
    first.merge([second, third])  # a rank without windows, and two others
    assert (first.quantiles(), first.by_position()) == (quantiles, token_losses.by_position())


def test_it_adds_up_to_the_loss_of_the_evaluation():
    s = stream("world:mqar,pairs=2,length=12,vocab=16", seq_len=12)
    model = Transformer(
        ModelConfig(vocab_size=64, n_layers=1, d_model=16, n_heads=2, moe=MoEConfig(kind="dense"))
    )
    token_losses = TokenLosses()
    whole = evaluate(model, s, 40, 7, token_losses=token_losses)
    rows = token_losses.by_position()
    assert sum(row["targets"] for row in rows) == 80
    mean = sum(row["nats"] * row["targets"] for row in rows) / 80
    assert mean == pytest.approx(whole.val_loss, rel=1e-6)
    assert rows[0]["first"] == 4  # nothing is asked for among the pairs
    assert token_losses.quantiles()["50"] <= token_losses.quantiles()["max"]
