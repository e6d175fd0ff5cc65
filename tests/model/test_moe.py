"""The layers against their equations: output, selection and every gradient."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import (
    BalanceConfig,
    MoEConfig,
    RouterConfig,
    UsageError,
    latent_acc,
    latent_eff,
)
from headway.model.context import Context
from headway.model.layers import LatentMoE, MoE, MultiHeadLatentMoE
from headway.model.moe import SparseLayer
from headway.model.packing import pack_
from headway.model.router import capacity
from tests.compare import assert_close
from tests.model.layer_reference import layer_reference

GATES = [
    RouterConfig(),
    RouterConfig(gate="softmax_topk"),
    RouterConfig(gate="softmax_topk", renormalize=True),
    RouterConfig(gate="sigmoid"),
    RouterConfig(gate="sigmoid", renormalize=True, scale=5.0),
]


def build(
    kind, router=RouterConfig(), top_k=2, activation="swiglu", d_shared=0, n_experts=5, **options
):
    """A small float64 layer with a bias that matters."""
    shared = dict(activation=activation, d_shared=d_shared, router=router, **options)
    if kind == "moe":
        layer = MoE(12, n_experts, top_k, 6, **shared)
    elif kind == "latent":
        layer = LatentMoE(12, 4, n_experts, top_k, 6, **shared)
    else:
        projection = "none" if kind == "slices" else "learned"
        layer = MultiHeadLatentMoE(12, 3, n_experts, top_k, 6, projection=projection, **shared)
    layer.double()
    with torch.no_grad():
        layer.router.bias_HE.normal_(generator=torch.Generator().manual_seed(1))
    return layer


def check(layer, x):
    d_out = torch.randn_like(x)
    out, stats = layer(x)
    want, chosen = layer_reference(layer, x)
    assert_close(out, want, 1e-12)
    parameters = [p for _, p in sorted(layer.named_parameters())]
    got_grads = torch.autograd.grad(out, [x, *parameters], d_out, allow_unused=True)
    want_grads = torch.autograd.grad(want, [x, *parameters], d_out, allow_unused=True)
    for got, want_grad in zip(got_grads, want_grads, strict=True):
        if want_grad is None:
            assert got is None
        else:
            assert_close(got, want_grad, 1e-11)
    counts = [
        torch.bincount(chosen[:, h].flatten(), minlength=layer.config.n_experts)
        for h in range(chosen.shape[1])
    ]
    assert torch.equal(stats.counts_HE, torch.stack(counts).double())


@pytest.mark.parametrize("kind", ["moe", "latent", "multi_head", "slices"])
@pytest.mark.parametrize("router", GATES, ids=lambda r: f"{r.gate}-{r.renormalize}-{r.scale}")
def test_equals_the_equations(kind, router):
    layer = build(kind, router)
    check(layer, torch.randn(7, 12, dtype=torch.float64, requires_grad=True))


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["moe", "latent", "multi_head", "slices"]),
    router=st.sampled_from(GATES[1:4]),
    reads=st.sampled_from(["sub_token", "token"]),
    top_k=st.integers(1, 5),
    activation=st.sampled_from(["swiglu", "relu2", "gelu"]),
    d_shared=st.sampled_from([0, 7]),
    tokens=st.integers(1, 9),
    recompute=st.booleans(),
    norm=st.booleans(),
)
def test_every_combination_equals_the_equations(
    kind, router, reads, top_k, activation, d_shared, tokens, recompute, norm
):
    if router.renormalize and top_k == 1:
        router = replace(router, renormalize=False)
    options = {"recompute": recompute} | ({} if kind == "moe" else {"latent_norm": norm})
    layer = build(kind, replace(router, reads=reads), top_k, activation, d_shared, **options)
    check(layer, torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("kind", ["moe", "latent", "multi_head"])
@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(logit_bias=True),
        RouterConfig(gate="sigmoid", renormalize=True, logit_bias=True),
        RouterConfig(gate="softmax_topk", n_groups=3, top_k_groups=2),
        RouterConfig(gate="sigmoid", n_groups=3, top_k_groups=2, group_best=2, logit_bias=True),
    ],
    ids=str,
)
def test_options_of_published_routers(kind, router):
    layer = build(kind, router, n_experts=6)
    with torch.no_grad():
        if layer.router.logit_bias_HE is not None:
            layer.router.logit_bias_HE.normal_()
    x = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    check(layer, x)
    by_sequence = SparseLayer(
        12, replace(layer.config, balance=BalanceConfig(aux=1.0, aux_scope="sequence"))
    ).double()
    by_sequence.load_state_dict(layer.state_dict())
    assert torch.equal(by_sequence(x.view(4, 10, 12))[1].counts_HE, layer(x)[1].counts_HE)


def biased(kind, **options):
    layer = build(kind, activation="swiglu_clamped", expert_bias=True, **options)
    with torch.no_grad():
        for name, p in layer.experts.named_parameters():
            p.mul_(8) if name[0] == "w" else p.normal_()  # so that some units are clamped
    return layer


@pytest.mark.parametrize("kind", ["moe", "latent", "multi_head"])
@pytest.mark.parametrize("recompute", [False, True])
def test_experts_of_gpt_oss(kind, recompute):
    layer = biased(kind, d_shared=7, recompute=recompute)
    check(layer, torch.randn(30, 12, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["moe", "multi_head"])
def test_biased_experts_in_float32(kind, packed):
    layer, x = biased(kind), torch.randn(40, 12, dtype=torch.float64)
    want, chosen = layer_reference(layer, x)
    layer.float()
    if packed:
        pack_(layer, torch.float32)
    with torch.no_grad():
        out, _ = layer(x.float(), Context(replay=(chosen,)))
        some, _ = layer(x[7:9].float(), Context(replay=(chosen[7:9],)))
    assert_close(out, want, 1e-5)
    if packed and layer.experts.packed is not None:
        assert torch.equal(some, out[7:9])


def test_a_dropped_slot_has_no_bias():
    layer = biased("moe", capacity_factor=0.2)
    x = torch.randn(1, 30, 12, dtype=torch.float64)
    out, stats = layer(x)
    assert stats.dropped > 0.5 and out.eq(0).all(-1).any() and out.ne(0).all(-1).any()


@pytest.mark.parametrize("kind", ["moe", "latent", "multi_head"])
def test_a_gate_on_the_shared_expert(kind):
    layer = build(kind, d_shared=7, shared_gate=True)
    check(layer, torch.randn(7, 12, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, bound):
    layer = build("multi_head").float()
    x = torch.randn(30, 12)
    with torch.no_grad():
        out, stats = layer(x.to(dtype))
        # the selection may differ where rounding moves a score, so replay the reference's
        reference = build("multi_head").float()
        reference.load_state_dict(layer.state_dict())
        want, chosen = layer_reference(reference.double(), x.to(dtype).double())
        out, _ = layer(x.to(dtype), Context(replay=(chosen,)))
    assert out.dtype == dtype and stats.prob_HE.dtype == torch.float32
    assert_close(out, want, bound)


def test_takes_any_leading_shape():
    layer = build("multi_head")
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    out, _ = layer(x)
    assert_close(out.flatten(0, 2), layer(x.flatten(0, 2))[0], 1e-12)


def test_replays_a_selection():
    layer = build("multi_head", top_k=2)
    x = torch.randn(6, 12, dtype=torch.float64)
    given_index = torch.randint(0, 5, (6, 3, 1)).repeat(1, 1, 2)
    given_index[..., 1] = (given_index[..., 0] + 1) % 5
    _, stats = layer(x, Context(replay=(given_index,)))
    assert torch.equal(
        stats.counts_HE[1],
        torch.bincount(given_index[:, 1].flatten(), minlength=layer.config.n_experts).double(),
    )


def test_capacity_drops_the_later_tokens():
    layer = build("moe", capacity_factor=0.5)
    with torch.no_grad():
        layer.router.bias_HE[:] = torch.tensor([9.0, 8.0, 0.0, 0.0, 0.0])  # all choose 0 and 1
    x = torch.randn(10, 12, dtype=torch.float64)
    out, stats = layer(x)
    assert capacity(0.5, 10, 2, 5) == 2  # ⌈0.5 · 10 · 2 / 5⌉
    assert (out[2:] == 0).all() and (out[:2] != 0).any()
    assert float(stats.dropped) == pytest.approx(0.8)
    assert stats.counts_HE.tolist() == [[10, 10, 0, 0, 0]]  # what was asked for, before dropping


@pytest.mark.parametrize("kind", ["moe", "latent", "multi_head"])
def test_every_sequence_has_a_capacity_of_its_own(kind):
    """What is dropped of a sequence does not depend on those beside it; tokens without a sequence
    dim are one."""
    layer = build(kind, capacity_factor=0.5)
    x = torch.randn(4, 10, 12, dtype=torch.float64)
    out, stats = layer(x)
    assert 0 < float(stats.dropped) < 1
    assert_close(out, torch.stack([layer(row)[0] for row in x]), 1e-12)
    assert not torch.equal(out.flatten(0, 1), layer(x.flatten(0, 1))[0])


def test_capacity_that_suffices_changes_nothing():
    x = torch.randn(10, 12, dtype=torch.float64)
    free, bounded = build("multi_head"), build("multi_head", capacity_factor=5.0)
    bounded.load_state_dict(free.state_dict())
    assert torch.equal(free(x)[0], bounded(x)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_constant_memory_form_keeps_nothing_of_tokens_by_experts(recompute):
    layer = MultiHeadLatentMoE(8, 2, 64, 2, 4, recompute=recompute)
    x = torch.randn(100, 8, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out, stats = layer(x)
        loss = out.sum() + stats.prob_HE.square().sum() + stats.z_H.sum()
    tokens_by_experts = 100 * 2 * 64
    weights = {p.numel() for p in layer.parameters()}
    wide = [t for t in kept if t.numel() >= tokens_by_experts and t.numel() not in weights]
    assert bool(wide) != recompute
    loss.backward()


def test_recompute_gives_the_same_bits():
    torch.manual_seed(0)
    layers = [
        MultiHeadLatentMoE(8, 2, 6, 2, 4, recompute=r, router=RouterConfig(noisy=True, jitter=0.1))
        for r in (False, True)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x, grads = torch.randn(20, 8), []
    for layer in layers:
        torch.manual_seed(3)
        out, stats = layer(x)
        (out.square().sum() + stats.prob_HE.square().sum()).backward()
        grads.append([p.grad for p in layer.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_heads_are_independent():
    """Changing one head's experts changes only what that head adds."""
    layer = build("multi_head")
    x = torch.randn(5, 12, dtype=torch.float64)
    z = layer.split(x)
    before = layer.experts(z, layer.router(z))
    with torch.no_grad():
        layer.experts.w_out_HEFL[1] += 1
    after = layer.experts(z, layer.router(z))
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_published_latent_acc_sizes():
    """LatentMoE's 95B model: N 128, K 6, D 4096, F 2688, ReLU², α 4 → 512 experts, top-22; eff top-6."""
    assert latent_acc(128, 6, 4, 2688, 4096, "relu2") == (512, 22)
    assert latent_eff(128, 6, 4) == (512, 6)
    with pytest.raises(UsageError, match="raise top_k=1"):
        latent_acc(8, 1, 2, 16, 64, "swiglu")


def test_initial_output_has_the_scale_of_its_input():
    torch.manual_seed(0)
    layer = MultiHeadLatentMoE(256, 4, 8, 2, 128, activation="relu2")
    out, _ = layer(torch.randn(500, 256))
    assert 0.2 < float(out.detach().std()) < 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MoE(8, 4, 5, 4), "top_k=5 must lie between 1 and n_experts=4"),
        (lambda: MoE(8, 4, 0, 4), "top_k=0 must lie between 1 and n_experts=4"),
        (lambda: MoE(8, 4, 1, 4), "top_k=1 with gate='topk_softmax'"),
        (lambda: MultiHeadLatentMoE(8, 3, 4, 2, 4), "n_heads=3 must divide the latent width 8"),
        (lambda: MoE(8, 4, 2, 4, router=RouterConfig(scale=0.0)), "scale > 0"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_sparse_layer_follows_its_config():
    c = MoEConfig(
        kind="multi_head_latent", n_heads=2, d_latent=16, n_experts=4, top_k=2, d_expert=3
    )
    layer = SparseLayer(8, c)
    assert layer.experts.w_in_HEGFL.shape == (2, 4, 2, 3, 8)
    quantile = BalanceConfig(bias="quantile")
    flat = SparseLayer(8, replace(c, kind="moe", n_heads=1, d_latent=0, balance=quantile))
    assert flat.w_in is None and flat.router.wants_margins
    assert math.prod(flat.experts.w_in_HEGFL.shape) == 4 * 2 * 3 * 8


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["moe", "latent", "multi_head"])
def test_a_gpu_gives_the_numbers_of_the_equations(kind):
    layer = build(kind)
    x = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn_like(x)
    want, _ = layer_reference(layer, x)
    parameters = [x, *layer.parameters()]
    want_grads = torch.autograd.grad(want, parameters, d_out)
    layer.cuda()
    on_gpu = x.detach().cuda().requires_grad_()
    out, _ = layer(on_gpu)
    grads = torch.autograd.grad(out, [on_gpu, *layer.parameters()], d_out.cuda())
    assert_close(out.cpu(), want, 1e-12)
    for got, want_grad in zip(grads, want_grads, strict=True):
        assert_close(got.cpu(), want_grad, 1e-11)


def test_a_layer_of_keywords_is_that_of_its_config():
    """The same options, the same defaults, whichever way a layer is built."""
    sizes = {"n_experts": 4, "top_k": 2, "d_expert": 3}
    for layer, kind in (
        (MoE(8, 4, 2, 3), {"kind": "moe"}),
        (LatentMoE(8, 6, 4, 2, 3), {"kind": "latent", "d_latent": 6}),
        (MultiHeadLatentMoE(8, 2, 4, 2, 3), {"kind": "multi_head_latent", "n_heads": 2}),
    ):
        config = MoEConfig(**sizes, **kind)
        built = SparseLayer(8, config)
        assert layer.config == config and layer.reads_token == built.reads_token
        shapes = {name: x.shape for name, x in built.state_dict().items()}
        assert shapes == {name: x.shape for name, x in layer.state_dict().items()}
