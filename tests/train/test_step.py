"""The gradient of a step does not depend on how the batch is split; biases move once."""

import dataclasses

import pytest
import torch

from headway.config import BalanceConfig, ModelConfig, MoEConfig, OptimConfig
from headway.data.batch import Batch, micro_batches
from headway.model.balance import aux_loss, new_bias
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers
from headway.parallel.reduce import total_norm
from headway.train.objective import NextToken
from headway.train.step import gradient, update

CPU = torch.device("cpu")


def _model(balance, dtype=torch.float32):
    moe = MoEConfig(n_heads=2, n_experts=4, top_k=2, d_expert=16, balance=balance)
    config = ModelConfig(vocab_size=64, n_layers=2, d_model=32, n_heads=2, moe=moe)
    model = Transformer(config, Compute(dtype=dtype), seed=0)
    return model.double() if dtype == torch.float64 else model


def _batch(rows=8):
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(64, (2, rows, 16), generator=generator)
    targets[0, :9] = -1  # micro-batches with unequal numbers of targets
    return Batch(tokens, targets, None)


def _grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_accumulation_equals_the_whole_batch(size, dtype, bound):
    """With an auxiliary loss, which reads the load that is given."""
    balance = BalanceConfig(aux=0.05, z=1e-3)
    batch = _batch()
    whole, split = _model(balance, dtype), _model(balance, dtype)
    load = [torch.tensor([[9, 1, 1, 1], [0, 2, 4, 6]], dtype=dtype)] * 2
    one = gradient(whole, [batch], NextToken(balance), load=load)
    parts = gradient(split, micro_batches(batch, size, CPU), NextToken(balance), load=load)
    assert parts.balance == pytest.approx(one.balance, rel=bound)
    assert parts.loss_sum == pytest.approx(one.loss_sum, rel=bound)
    assert parts.norm == pytest.approx(one.norm, rel=10 * bound)
    assert one.norm == float(total_norm(p.grad for p in whole.parameters()))
    for a, b in zip(one.routes, parts.routes, strict=True):
        assert torch.equal(a.counts_HE, b.counts_HE)
        torch.testing.assert_close(a.entropy_H, b.entropy_H, rtol=10 * bound, atol=0)
    ours, theirs = _grads(split), _grads(whole)
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        assert float((ours[name] - g).norm() / g.norm()) < 10 * bound, name


def test_the_auxiliary_loss_reads_the_step_before():
    """The first step an even load, which gives it no gradient; then what the last one counted."""
    balance = BalanceConfig(aux=0.1)
    batch = _batch()
    name = "layers.1.ffn.router.w_HEL"
    nothing = _model(BalanceConfig(aux=0.0), torch.float64)
    gradient(nothing, [batch], NextToken(BalanceConfig(aux=0.0)))
    first, second = _model(balance, torch.float64), _model(balance, torch.float64)
    measured = gradient(first, [batch], NextToken(balance))
    assert measured.balance == pytest.approx(0.1)
    torch.testing.assert_close(_grads(first)[name], _grads(nothing)[name])
    again = gradient(second, [batch], NextToken(balance), load=measured.load)
    want = [aux_loss(r.counts_HE, r.prob_HE).mean() for r in measured.routes]
    assert again.balance == pytest.approx(0.1 * float(sum(want)) / 2)
    assert again.balance > 0.1001
    difference = (_grads(second)[name] - _grads(nothing)[name]).norm()
    assert difference > 0.01 * _grads(nothing)[name].norm()


def test_the_balance_loss_is_the_mean_over_micro_batches():
    """At coefficient c the gradient moves by c times that of the auxiliary loss, whatever the
    split."""
    batch = _batch()
    none = BalanceConfig(aux=0.0, z=0.0)
    with_z = dataclasses.replace(none, z=1e-2)
    results = []
    for size in (8, 2):
        plain, zed = _model(none, torch.float64), _model(with_z, torch.float64)
        micros = micro_batches(batch, size, CPU)
        assert gradient(plain, micros, NextToken(none)).balance == 0.0
        results.append(gradient(zed, micros, NextToken(with_z)).balance)
        difference = {k: _grads(zed)[k] - g for k, g in _grads(plain).items()}
        results.append(difference["layers.1.ffn.router.w_HEL"])
    # The z-loss is a mean over tokens, so equal micro-batches average to the whole.
    assert results[0] == pytest.approx(results[2], rel=1e-6)
    torch.testing.assert_close(results[1], results[3], rtol=1e-9, atol=1e-15)


def test_update_clips_once_and_moves_the_bias_once():
    balance = BalanceConfig(aux=0.0, bias="sign", bias_rate=0.01)
    model = _model(balance)
    optim = OptimConfig(clip=0.1, weight_decay=0.0, eps=1.0)
    optimizers = build_optimizers(model, optim)
    batch = _batch()
    result = gradient(model, micro_batches(batch, 4, CPU), NextToken(balance))
    assert result.norm > 0.1
    grads = _grads(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    update(model, optimizers, result, 0.5, optim, balance)
    for layer, stats in zip(model.sparse_layers(), result.routes, strict=True):
        expected = new_bias(torch.zeros(2, 4), stats, balance)
        assert expected.abs().max() > 0
        assert torch.equal(layer.router.get_buffer("bias_HE"), expected)
    # First AdamW step with a large epsilon: p -= lr · g/(|g| + 1), g clipped.
    name = "layers.0.mixer.q.weight"
    g = grads[name] * (0.1 / (result.norm + 1e-6))
    expected = before[name] - 0.5 * optim.lr * g / (g.abs() + 1)
    torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-6, atol=1e-9)
