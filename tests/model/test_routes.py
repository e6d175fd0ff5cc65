"""What sparse layers report token by token, replaying it, and experts that do nothing."""

from dataclasses import replace

import pytest
import torch

from headway import LatentMoE, MoE, MultiHeadLatentMoE
from headway.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig, UsageError
from headway.model.balance import new_bias
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.moe import SparseLayer
from headway.model.transformer import Transformer
from tests.compare import assert_close

SMALL = ModelConfig(
    vocab_size=32,
    n_layers=3,
    d_model=16,
    n_heads=2,
    moe=MoEConfig(n_heads=2, n_experts=4, top_k=2, d_expert=8, n_dense_layers=1),
)
ALL = frozenset({"routes", "logits", "norms"})


def layer_of(kind, **options):
    torch.manual_seed(0)
    make = {
        "moe": lambda: MoE(12, 5, 2, 6, **options),
        "latent": lambda: LatentMoE(12, 4, 5, 2, 6, **options),
        "heads": lambda: MultiHeadLatentMoE(12, 3, 5, 2, 6, **options),
        "heads, token": lambda: MultiHeadLatentMoE(
            12, 3, 5, 2, 6, **{"router": RouterConfig(reads="token"), **options}
        ),
    }
    return make[kind]().double()


@pytest.mark.parametrize("kind", ["moe", "latent", "heads", "heads, token"])
def test_reports_are_what_the_router_did(kind):
    layer, x = layer_of(kind), torch.randn(7, 12, dtype=torch.float64)
    plain, none = layer(x)
    y, stats = layer(x, Context(report=ALL))
    assert_close(y, plain, 1e-12)
    assert none.report is None and stats.report is not None
    read = x if layer.reads_token else layer.split(x)
    route = layer.router(read)
    assert torch.equal(stats.report.index_THK, route.index_THK)
    assert_close(stats.report.gate_THK, route.gate_THK, 1e-12)
    assert_close(stats.report.logits_THE, layer.router.logits(read), 1e-12)
    norms = layer.experts(layer.split(x), route).norm(dim=-1)
    assert_close(stats.report.norm_TH.double(), norms, 1e-6)
    assert not stats.report.gate_THK.requires_grad
    assert layer(x, Context(report=frozenset({"routes"})))[1].report.logits_THE is None


def test_a_report_that_nobody_gives_is_named():
    with pytest.raises(UsageError, match="report=.*logit.*names more than"):
        Context(report=frozenset({"logit"}))


def test_a_model_replays_its_own_report_in_another_model():
    """The selection of one model in another: gates and loss follow the given experts."""
    x = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    one, other = (Transformer(SMALL, Compute(torch.float64), seed=seed).double() for seed in (0, 1))
    out = one(x, ctx=Context(report=ALL))
    assert len(out.routes) == 2 and all(report is not None for report in out.routes)
    replay = tuple(report.index_THK for report in out.routes)
    again = one(x, ctx=Context(replay=replay))
    assert_close(again.logits_BSV, out.logits_BSV, 1e-12)
    forced = other(x, ctx=Context(replay=replay, report=ALL))
    for given, report in zip(replay, forced.routes, strict=True):
        assert torch.equal(report.index_THK, given)
    assert not torch.equal(forced.logits_BSV, other(x).logits_BSV)


@pytest.mark.parametrize("kind", ["moe", "latent", "heads", "heads, token"])
def test_experts_that_do_nothing(kind):
    """As experts whose weights are 0, with their share of the gates; counted; gradients too."""
    layer, x = layer_of(kind, n_zero_experts=3), torch.randn(40, 12, dtype=torch.float64)
    y, stats = layer(x)
    assert stats.counts_HE.shape == (layer.n_heads, 8)
    assert float(stats.counts_HE.sum()) == 40 * layer.n_heads * 2
    assert float(stats.counts_HE[:, 5:].sum()) > 0
    config = replace(layer.config, n_experts=8, n_zero_experts=0)
    wide = SparseLayer(12, config).double()
    with torch.no_grad():
        for name, p in wide.named_parameters():
            p.copy_(_padded(layer.get_parameter(name), p.shape))
    want, counted = wide(x)
    assert_close(y, want, 1e-12)
    assert torch.equal(stats.counts_HE, counted.counts_HE)
    d_out = torch.randn_like(x)
    for name, grad in zip(
        dict(layer.named_parameters()),
        torch.autograd.grad(y, list(layer.parameters()), d_out),
        strict=True,
    ):
        other = torch.autograd.grad(want, wide.get_parameter(name), d_out, retain_graph=True)[0]
        keep = tuple(slice(0, n) for n in grad.shape)
        assert_close(grad, other[keep], 1e-11), name


def _padded(x, shape):
    full = x.new_zeros(shape)
    full[tuple(slice(0, n) for n in x.shape)] = x
    return full


def test_the_capacity_drops_no_slot_that_does_nothing():
    layer = layer_of("moe", n_zero_experts=2, capacity_factor=0.5)
    x = torch.randn(40, 12, dtype=torch.float64)
    z = layer.split(x)
    index, free = (layer.router(z, None, 10, dropless).index_THK for dropless in (False, True))
    zero = free >= 5
    assert torch.equal(index[zero], free[zero])
    assert (index == 7).any() and not zero[index == 7].any()


@pytest.mark.parametrize("kind", ["moe", "heads", "heads, token"])
def test_what_the_capacity_dropped_is_dropped_again_in_a_replay(kind):
    layer = layer_of(kind, capacity_factor=0.5)
    x = torch.randn(4, 10, 12, dtype=torch.float64)
    y, stats = layer(x, Context(report=ALL))
    assert float(stats.dropped) > 0.1 and stats.report.index_THK.max() < 5
    again, same = layer(x, Context(replay=(stats.report.index_THK,)))
    assert_close(again, y, 1e-12)
    assert torch.equal(same.counts_HE, stats.counts_HE)
    assert float(same.dropped) == float(stats.dropped)


def test_a_balance_rule_moves_experts_that_do_nothing_too():
    balance = BalanceConfig(aux=0, bias="sign")
    layer = layer_of("moe", n_zero_experts=3, balance=balance)
    x = torch.randn(50, 12, dtype=torch.float64)
    before = layer(x)[1].counts_HE
    for _ in range(400):
        bias = new_bias(layer.router.bias_HE, layer(x)[1], balance)
        layer.router.bias_HE.copy_(bias)
    after = layer(x)[1].counts_HE
    assert float(after.std()) < 0.5 * float(before.std())
