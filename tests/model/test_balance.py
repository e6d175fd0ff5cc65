from dataclasses import replace

import pytest
import torch

from headway.config import BalanceConfig
from headway.model.balance import (
    RouteStats,
    aux_loss,
    balance_loss,
    merge_stats,
    new_bias,
    quantile_margin,
)
from tests.compare import assert_close


def stats(counts, prob=None, z=0.0, quantile=None):
    counts = torch.tensor(counts, dtype=torch.float64)
    if prob is None:
        prob = counts / counts.sum(-1, keepdim=True)
    heads = torch.ones(counts.shape[0], dtype=torch.float64)
    return RouteStats(counts, prob, heads * z, heads, torch.tensor(0.0), quantile)


def test_aux_loss_is_one_when_balanced_and_e_when_collapsed():
    even, one = torch.full((2, 4), 5.0), torch.tensor([[20.0, 0, 0, 0]] * 2)
    assert float(aux_loss(even, even / 20)) == pytest.approx(1.0)
    assert float(aux_loss(one, one / 20)) == pytest.approx(4.0)


def test_loss_is_averaged_over_layers_and_reads_both_coefficients():
    layers = [stats([[4, 0]], z=2.0), stats([[2, 2]], z=4.0)]
    loss = balance_loss(layers, BalanceConfig(aux=0.1, z=0.01))
    assert float(loss) == pytest.approx((0.1 * 2.0 + 0.01 * 2.0 + 0.1 * 1.0 + 0.01 * 4.0) / 2)
    assert float(balance_loss([], BalanceConfig())) == 0


def test_global_batch_reads_the_running_counts():
    """Two micro-batches, each on one expert, together even: the global loss sees balance, the local one collapse."""
    first, second = stats([[6, 0]]), stats([[0, 6]])
    config = BalanceConfig(aux=1.0, aux_scope="global_batch")
    running = [torch.zeros(1, 2, dtype=torch.float64)]
    assert float(balance_loss([first], config, running)) == pytest.approx(2.0)
    assert float(balance_loss([second], config, running)) == pytest.approx(1.0)
    assert running[0].tolist() == [[6, 6]]
    local = replace(config, aux_scope="micro_batch")
    running = [torch.zeros(1, 2, dtype=torch.float64)]
    assert float(balance_loss([second], local, running)) == pytest.approx(2.0)


def test_gradient_flows_through_the_probabilities_only():
    prob = torch.tensor([[0.7, 0.3]], dtype=torch.float64, requires_grad=True)
    balance_loss([stats([[3, 1]], prob)], BalanceConfig(aux=0.5)).backward()
    assert_close(prob.grad, 0.5 * 2 * torch.tensor([[0.75, 0.25]]).double(), 1e-12)


def test_sign_rule_moves_against_the_load_and_stays_centred():
    config = BalanceConfig(aux=0, bias="sign", bias_rate=0.01)
    bias = new_bias(torch.zeros(1, 4, dtype=torch.float64), stats([[9, 1, 1, 1]]), config)
    assert_close(bias, torch.tensor([[-0.015, 0.005, 0.005, 0.005]], dtype=torch.float64), 1e-12)


def test_quantile_rule_balances_a_fixed_batch_in_a_few_steps():
    """Digest of arXiv 2607.24653: worst load / fair share − 1 falls from about 19 to 0.5 in one step."""
    g = torch.Generator().manual_seed(0)
    T, E, K = 4096, 64, 4
    scores = torch.sigmoid(torch.randn(T, 1, E, generator=g) + torch.randn(E, generator=g))
    bias = torch.zeros(1, E)

    def violation():
        chosen = (scores + bias).topk(K, -1).indices.flatten()
        return float(torch.bincount(chosen, minlength=E).max()) / (T * K / E) - 1

    before = violation()
    config = BalanceConfig(aux=0, bias="quantile")
    for _ in range(5):
        counts = torch.zeros(1, E)
        margin = quantile_margin(scores, bias, K)
        step = RouteStats(counts, counts, counts, counts, counts, margin)
        bias = new_bias(bias, step, config)
    assert before > 3 and violation() < 0.1


def test_quantile_is_the_next_margin_after_the_fair_share():
    scores = torch.randn(40, 2, 8, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    margins = scores + bias - (scores + bias).topk(4, -1).values[..., -1:]
    want = margins.sort(dim=0, descending=True).values[40 * 3 // 8]
    assert torch.equal(quantile_margin(scores, bias, 3), want)


def test_quantile_of_all_experts_chosen_is_zero():
    assert (quantile_margin(torch.randn(5, 1, 3), torch.zeros(1, 3), 3) == 0).all()


def test_merge_adds_counts_and_averages_the_rest():
    q = torch.ones(1, 2, dtype=torch.float64)
    merged = merge_stats(
        [stats([[1, 2]], z=1.0, quantile=q), stats([[3, 4]], z=3.0, quantile=3 * q)]
    )
    assert merged.counts_HE.tolist() == [[4, 6]]
    assert merged.z_H.tolist() == [2.0] and merged.quantile_HE.tolist() == [[2.0, 2.0]]
