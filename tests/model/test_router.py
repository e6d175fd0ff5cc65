import pytest
import torch

from headway.config import BalanceConfig, MoEConfig, RouterConfig
from headway.model.balance import aux_loss, merge_stats
from headway.model.init import init_weights
from headway.model.router import Router
from tests.compare import assert_close


def build(
    config=RouterConfig(),
    balance=BalanceConfig(),
    n_experts=6,
    top_k=2,
    heads=2,
    capacity_factor=0.0,
):
    shape = MoEConfig(
        n_experts=n_experts,
        top_k=top_k,
        n_heads=heads,
        d_latent=4 * heads,
        router=config,
        balance=balance,
        capacity_factor=capacity_factor,
    )
    router = Router(9, shape).double()
    init_weights(router, seed=0)
    return router


def test_gates_of_selected_scores_sum_to_one_and_follow_the_scores():
    router, x = build(), torch.randn(9, 2, 4, dtype=torch.float64)
    route = router(x)
    assert_close(route.gate_THK.sum(-1), torch.ones(9, 2, dtype=torch.float64), 1e-12)
    chosen = router.logits(x).gather(-1, route.index_THK)
    assert (chosen[..., 0] >= chosen[..., 1]).all()
    assert (route.gate_THK[..., 0] >= route.gate_THK[..., 1]).all()


def test_bias_moves_the_selection_but_not_the_gates():
    router, x = build(), torch.randn(9, 2, 4, dtype=torch.float64)
    router.bias_HE[:, 3] = 100.0
    route = router(x)
    assert (route.index_THK[..., 0] == 3).all()
    logits = router.logits(x).gather(-1, route.index_THK)
    assert_close(route.gate_THK, torch.softmax(logits, -1), 1e-12)


def test_statistics_are_their_definitions():
    router, x = build(), torch.randn(50, 2, 4, dtype=torch.float64)
    stats = router(x).stats
    logits = router.logits(x)
    prob = torch.softmax(logits, -1)
    assert_close(stats.prob_HE, prob.mean(0), 1e-12)
    assert_close(stats.z_H, torch.logsumexp(logits, -1).square().mean(0), 1e-12)
    entropy = -(prob * prob.log()).sum(-1).mean(0) / torch.log(torch.tensor(6.0)).double()
    assert_close(stats.entropy_H, entropy, 1e-6)
    assert stats.counts_HE.sum() == 50 * 2 * 2
    assert stats.margins_HEQ is None and stats.aux_H is None


@pytest.mark.parametrize("gate", ["topk_softmax", "sigmoid"])
def test_sequences_have_an_auxiliary_loss_and_a_capacity_each(gate):
    """Three sequences together equal each of them alone: what is chosen, dropped, and counted."""
    balance = BalanceConfig(aux=0.01, aux_scope="sequence")
    router = build(RouterConfig(gate=gate), balance, capacity_factor=1.0)
    x = torch.randn(30, 2, 4, dtype=torch.float64)
    one = router(x, seq_len=10)
    alone = [router(part) for part in x.split(10)]
    assert torch.equal(one.index_THK, torch.cat([r.index_THK for r in alone]))
    assert (one.index_THK == 6).any() and (one.index_THK < 6).any(-1).any()
    assert_close(one.gate_THK, torch.cat([r.gate_THK for r in alone]), 1e-12)
    merged = merge_stats([r.stats for r in alone])
    for name, value in merged._asdict().items():
        if value is not None:
            assert_close(one.stats._asdict()[name], value, 1e-12)
    wholly = [aux_loss(r.stats.counts_HE, r.stats.prob_HE) for r in alone]
    assert_close(one.stats.aux_H, torch.stack(wholly).mean(0), 1e-12)
    assert not torch.equal(one.index_THK, router(x).index_THK), "one sequence of 30 drops others"
    replayed = router(x, torch.roll(router(x, dropless=True).index_THK, 1, 0), seq_len=10)
    assert (replayed.index_THK == 6).any() and replayed.stats.aux_H is not None


def test_dropless_ignores_the_capacity():
    bounded = build(capacity_factor=0.5)
    x = torch.randn(30, 2, 4, dtype=torch.float64)
    assert (bounded(x).index_THK == 6).any() and float(bounded(x).stats.dropped) > 0
    free = bounded(x, dropless=True)
    assert torch.equal(free.index_THK, build()(x).index_THK) and float(free.stats.dropped) == 0


def test_noise_and_jitter_act_in_training_only():
    for config in (RouterConfig(noisy=True), RouterConfig(jitter=0.3)):
        router, x = build(config), torch.randn(9, 2, 4, dtype=torch.float64)
        assert not torch.equal(router.logits(x), router.logits(x))
        router.eval()
        assert torch.equal(router.logits(x), router.logits(x))


def test_noise_has_the_published_standard_deviation():
    """Zero noise weights: softplus(0) = log 2 (Shazeer et al. 2017, eq. 4)."""
    router = build(RouterConfig(noisy=True))
    x = torch.randn(4000, 2, 4, dtype=torch.float64)
    noisy = router.logits(x)
    noise = noisy - router.eval().logits(x)
    assert float(noise.std()) == pytest.approx(0.6931, rel=0.02)


def test_jitter_stays_in_its_range():
    router = build(RouterConfig(jitter=0.25), heads=1)
    with torch.no_grad():
        router.w_HEL.fill_(0)
        router.w_HEL[0, 0, 0] = 1.0
    scores = router.logits(torch.ones(2000, 1, 4, dtype=torch.float64))[:, 0, 0]
    assert 0.75 <= float(scores.min()) < 0.76 and 1.24 < float(scores.max()) <= 1.25


def test_router_reads_a_whole_token_for_all_heads():
    router, x = build(), torch.randn(5, 4, dtype=torch.float64)
    assert_close(router.logits(x), router.logits(x.unsqueeze(1).expand(5, 2, 4)), 1e-12)


def test_scores_are_float32_for_bfloat16_tokens():
    router = Router(4, MoEConfig(n_experts=6, top_k=2))
    init_weights(router, seed=0)
    x = torch.randn(5, 1, 4).bfloat16()
    route = router(x)
    assert route.gate_THK.dtype == torch.float32
    assert_close(router.logits(x), router.logits(x.float()), 1e-7)


def test_zero_tokens():
    route = build()(torch.randn(0, 2, 4, dtype=torch.float64))
    assert route.index_THK.shape == (0, 2, 2) and (route.stats.counts_HE == 0).all()
