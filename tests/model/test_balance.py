import math

import pytest
import torch

from headway.config import BalanceConfig, UsageError
from headway.model.balance import (
    FINEST,
    LARGEST,
    N_BINS,
    RouteStats,
    aux_loss,
    balance_loss,
    margin_counts,
    merge_stats,
    new_bias,
    quantile_margin,
)
from tests.compare import assert_close


def stats(counts, prob=None, z=0.0, margins=None):
    counts = torch.tensor(counts, dtype=torch.float64)
    if prob is None:
        prob = counts / counts.sum(-1, keepdim=True)
    heads = torch.ones(counts.shape[0], dtype=torch.float64)
    return RouteStats(counts, prob, heads * z, heads, torch.tensor(0.0), None, margins)


def test_aux_loss_is_one_when_balanced_and_e_when_collapsed():
    even, one = torch.full((2, 4), 5.0), torch.tensor([[20.0, 0, 0, 0]] * 2)
    assert aux_loss(even, even / 20).tolist() == pytest.approx([1.0] * 2)
    assert aux_loss(one, one / 20).tolist() == pytest.approx([4.0] * 2)


def test_loss_is_averaged_over_layers_and_reads_both_coefficients():
    layers = [stats([[4, 0]], z=2.0), stats([[2, 2]], z=4.0)]
    loss = balance_loss(layers, BalanceConfig(aux=0.1, z=0.01))
    assert float(loss) == pytest.approx((0.1 * 2.0 + 0.01 * 2.0 + 0.1 * 1.0 + 0.01 * 4.0) / 2)
    assert float(balance_loss([], BalanceConfig())) == 0


def test_layers_of_different_sizes_are_averaged_as_each_alone():
    """Sizes that alternate, with and without a load of their own."""
    layers = [stats([[4, 0], [1, 3]], z=2.0), stats([[3, 2, 1]], z=4.0), stats([[0, 4], [2, 2]])]
    load = [layer.counts_HE + 1 + i for i, layer in enumerate(layers)]
    config = BalanceConfig(aux=0.1, z=0.01)
    for loads in (None, load):
        alone = [
            float(balance_loss([layer], config, loads and [loads[i]]))
            for i, layer in enumerate(layers)
        ]
        loss = float(balance_loss(layers, config, loads))
        assert len(set(alone)) == 3 and loss == pytest.approx(sum(alone) / 3, rel=1e-12)


def test_every_micro_batch_reads_the_load_that_is_given():
    """Two micro-batches, each on one expert: by the load of a step both see how uneven that is, by
    their own both see collapse."""
    first, second = stats([[6, 0]]), stats([[0, 6]])
    config = BalanceConfig(aux=1.0)
    load = [torch.tensor([[9.0, 3.0]], dtype=torch.float64)]
    assert float(balance_loss([first], config, load)) == pytest.approx(2 * 0.75)
    assert float(balance_loss([second], config, load)) == pytest.approx(2 * 0.25)
    assert [float(balance_loss([s], config)) for s in (first, second)] == pytest.approx([2.0, 2.0])


def test_layers_that_do_not_count_sequences_are_named():
    config = BalanceConfig(aux=1.0, aux_scope="sequence")
    with pytest.raises(UsageError, match="the layer was built with another balance"):
        balance_loss([stats([[6, 0]])], config)
    assert float(balance_loss([stats([[6, 0]])._replace(aux_H=torch.tensor([1.5]))], config)) == 1.5


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
        rows = torch.full((1, E), T * K / E)
        step = RouteStats(rows, rows, rows, rows, rows, None, margin_counts(scores, bias, K))
        bias = new_bias(bias, step, config)
    assert before > 3 and violation() < 0.1


def margins(scores, bias, k):
    return scores + bias - (scores + bias).topk(k + 1, -1).values[..., -1:]


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_quantile_is_the_next_margin_after_the_fair_share(scale):
    """Within a bin; the histogram covers every scale of scores."""
    T, H, E, K = 4000, 2, 8, 3
    scores = scale * torch.randn(T, H, E, generator=torch.Generator().manual_seed(1)).double()
    bias = scale * torch.randn(H, E, generator=torch.Generator().manual_seed(2)).double()
    want = margins(scores, bias, K).sort(dim=0, descending=True).values[T * K // E]
    rows = torch.full((H, E), T * K / E)
    got = quantile_margin(margin_counts(scores, bias, K), rows)
    assert float(want.abs().max()) > 0.2 * scale
    assert ((got - want).abs() <= 0.05 * want.abs() + 5e-5).all()


def test_counts_of_margins_add_up_to_those_of_the_batch():
    """Quantiles do not: their mean was the bias of a step in micro-batches."""
    scores = torch.randn(60, 2, 8, generator=torch.Generator().manual_seed(1)).double()
    scores[:30] += torch.arange(8)  # the halves differ
    bias, rows = torch.zeros(2, 8, dtype=torch.float64), torch.full((2, 8), 60 * 3 / 8)
    whole = margin_counts(scores, bias, 3)
    halves = [margin_counts(half, bias, 3) for half in scores.split(30)]
    assert torch.equal(whole, halves[0] + halves[1]) and whole.sum(-1).eq(60).all()
    mean = torch.stack([quantile_margin(half, rows / 2) for half in halves]).mean(0)
    assert float((quantile_margin(whole, rows) - mean).abs().max()) > 0.3


def test_margins_at_and_beyond_the_edges_are_counted():
    """Two experts, K = 1: the margin of the first is 0 or the difference of the scores."""
    scores = torch.zeros(4, 1, 2)
    scores[:, 0, 0] = torch.tensor([0.0, FINEST, 2 * LARGEST, 1e30])
    counts = margin_counts(scores, torch.zeros(1, 2), 1)
    assert counts.sum(-1).tolist() == [[4, 4]]
    middle = N_BINS // 2 - 1
    assert counts[0, 0, middle] == 1, "0 belongs to the bin below: it is not chosen"
    assert counts[0, 0, -1] == 2 and counts[0, 1, middle] == 4
    scores[0, 0, 0] = math.nan
    assert margin_counts(scores, torch.zeros(1, 2), 1).sum(-1).tolist() == [[4, 4]]
    rows = torch.tensor([[0.5, 0.5]])
    assert float(quantile_margin(counts, rows)[0, 0]) == pytest.approx(LARGEST)


def test_quantile_of_all_experts_chosen_and_of_no_tokens_is_zero():
    for scores in (torch.randn(5, 1, 3), torch.randn(0, 1, 3)):
        counts = margin_counts(scores, torch.zeros(1, 3), 3)
        assert (quantile_margin(counts, torch.full((1, 3), float(len(scores)))) == 0).all()


def test_merge_adds_counts_and_averages_the_rest():
    few, many = torch.ones(1, 2, 3, dtype=torch.int32), torch.full((1, 2, 3), 4, dtype=torch.int32)
    merged = merge_stats(
        [stats([[1, 2]], z=1.0, margins=few), stats([[3, 4]], z=3.0, margins=many)]
    )
    assert merged.counts_HE.tolist() == [[4, 6]] and merged.z_H.tolist() == [2.0]
    assert merged.margins_HEQ.dtype == torch.int32 and (merged.margins_HEQ == 5).all()
    assert merged.aux_H is None
