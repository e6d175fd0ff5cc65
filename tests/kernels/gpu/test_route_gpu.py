"""The router's Triton kernels beside float64, and what they keep."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.config import BalanceConfig, MoEConfig, RouterConfig
from headway.kernels.route import Routed, keeps_no_logits, logits, route, route_reference
from headway.model.compute import Compute
from headway.model.init import init_weights
from headway.model.router import Router
from tests.compare import assert_close, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of log 0 and the like

OPTIONS = (3, "topk_softmax", False, 1.0)
ROUNDED = 2e-3
"""Of a gradient in bfloat16: rounded to nearest, 2⁻⁹ at most."""


def make(T, H, E, L, device, dtype=torch.float32, shared=False):
    x = torch.randn(T, L) if shared else torch.randn(T, H, L)
    w = torch.randn(H, E, L) * L**-0.5
    x, w = x.to(dtype).to(device).requires_grad_(), w.to(device).requires_grad_()
    return x, w, 0.1 * torch.randn(H, E).to(device)


def wide(x, w, bias, index, options):
    """The reference in float64, and its leaves."""
    x, w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    index = None if index is None else index.long()
    return route_reference(logits(x, w), bias.double(), index, *options), x, w


def back(routed, names, *leaves):
    """Gradients through some outputs, each with random weights."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    for name in names:
        out = routed._asdict()[name]
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        total = total + (out * weight.to(out.device, out.dtype)).sum()
    return torch.autograd.grad(total, leaves)


def check(x, w, bias, index, options, names=("gate_THK", "prob_HE", "z_H"), chooses=True):
    assert keeps_no_logits(x, w, bias)
    got = route(x, w, bias, index, *options)
    want, x_64, w_64 = wide(x, w, bias, got.index_THK, options)
    if chooses and index is None:
        chosen = wide(x, w, bias, None, options)[0].index_THK
        assert torch.equal(got.index_THK.long(), chosen)
    for name, a, b in zip(Routed._fields, got, want, strict=True):
        assert a.dtype == (torch.int32 if name == "index_THK" else torch.float32)
        if name == "entropy_H":  # to 1e-6 of the greatest
            a, b = a + 1, b + 1
        assert relative_error(a, b) <= (0 if name == "counts_HE" else 2e-6), name
    (dx, dw), (dx_64, dw_64) = back(got, names, x, w), back(want, names, x_64, w_64)
    assert dx.dtype == x.dtype and dx.is_contiguous() and dw.dtype == torch.float32
    assert_close(dw, dw_64, 1e-5 if x.dtype == torch.bfloat16 else 3e-6)
    assert_close(dx, dx_64, ROUNDED if x.dtype == torch.bfloat16 else 3e-6)
    return got


CASES = [  # T, H, E, L, k, dtype, gate, renormalize, one token for all heads
    (19, 2, 39, 24, 3, "bfloat16", "topk_softmax", False, False),
    (70, 1, 150, 16, 8, "bfloat16", "softmax_topk", True, False),
    (9, 2, 70, 33, 6, "float32", "sigmoid", True, False),
    (5, 2, 20, 80, 4, "bfloat16", "sigmoid", False, True),
    (5, 2, 80, 300, 2, "float32", "softmax_topk", False, True),
    (7, 1, 1, 16, 1, "float32", "sigmoid", False, False),
    (7, 2, 5, 16, 5, "float32", "topk_softmax", True, False),
    (3, 3, 16, 8, 1, "bfloat16", "softmax_topk", False, False),
]


@pytest.mark.parametrize("T, H, E, L, k, dtype, gate, renormalize, shared", CASES)
def test_equals_float64(T, H, E, L, k, dtype, gate, renormalize, shared, device):
    torch.manual_seed(0)
    x, w, bias = make(T, H, E, L, device, getattr(torch, dtype), shared)
    check(x, w, bias, None, (k, gate, renormalize, 1.5))


@pytest.mark.parametrize(
    "gate, names",
    [
        ("topk_softmax", ["gate_THK"]),
        ("sigmoid", ["gate_THK"]),
        ("softmax_topk", ["gate_THK"]),
        ("sigmoid", ["prob_HE"]),
        ("sigmoid", ["z_H"]),
        ("topk_softmax", ["z_H"]),
    ],
)
def test_gradient_of_some_outputs(gate, names, device):
    torch.manual_seed(0)
    x, w, bias = make(11, 2, 20, 16, device)
    check(x, w, bias, None, (3, gate, gate == "sigmoid", 1.0), names)


@pytest.mark.parametrize("E", [20, 70])
def test_several_programs_of_several_tiles(E, device, monkeypatch):
    """Partial sums of programs that walk more than one tile."""
    from headway.kernels.gpu import scores as kernels
    from headway.kernels.gpu.tune import Tiles

    monkeypatch.setattr(kernels, "PROGRAMS", 8)
    monkeypatch.setattr(kernels, "tiles", lambda kernel, shape, default: Tiles(16, 32, 4, 2))
    torch.manual_seed(0)
    x, w, bias = make(100, 1, E, 16, device, torch.bfloat16)
    check(x, w, bias, None, (2, "sigmoid", True, 1.0))


def test_more_choices_than_a_chunk_has_experts(device, monkeypatch):
    """An expert that was taken from the best so far does not come back to fill a place."""
    from headway.kernels.gpu import scores as kernels
    from headway.kernels.gpu.tune import Tiles

    monkeypatch.setattr(kernels, "tiles", lambda kernel, shape, default: Tiles(16, 16, 4, 2))
    torch.manual_seed(0)
    x, w, bias = make(12, 1, 50, 16, device)
    check(x, w, bias, None, (40, "sigmoid", False, 1.0))


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_ties_go_to_the_lowest_index(data, device):
    """Small integers: every score is exact, and many are equal."""
    E = data.draw(st.integers(1, 80))
    k, gate = (
        data.draw(st.integers(1, min(E, 8))),
        data.draw(st.sampled_from(["softmax_topk", "sigmoid"])),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, w, bias = (
        torch.randint(-2, 3, shape, generator=generator).float().to(device)
        for shape in ((6, 1, 4), (1, E, 4), (1, E))
    )
    bias *= 4
    got = route(x, w, bias, None, k, gate, False, 1.0)
    want = route_reference(logits(x, w), bias, None, k, gate, False, 1.0)
    assert torch.equal(got.index_THK.long(), want.index_THK)
    assert torch.equal(got.counts_HE, want.counts_HE)


@pytest.mark.parametrize("gate", ["topk_softmax", "softmax_topk", "sigmoid"])
@pytest.mark.parametrize("E", [12, 70])
def test_nan_and_infinity(gate, E, device):
    """Scores chosen by hand: the first column of the weights, read by a token (1, 0, …)
    in bfloat16. (In float32 its lower parts are 0, and 0·inf is NaN.)"""
    inf, nan = torch.inf, torch.nan
    score = torch.randn(7, E)
    score[0, 5], score[1, 7], score[2, 3] = nan, inf, -inf
    score[3, 2], score[3, 9] = nan, inf
    score[4], score[5] = -inf, nan
    score[6, [1, 4]] = inf
    bias = torch.zeros(1, E, device=device)
    bias[0, 6] = -inf
    x = torch.eye(16, device=device)[:1].unsqueeze(0).bfloat16()
    for row in score:
        w = torch.zeros(1, E, 16, device=device)
        w[0, :, 0] = row
        got = route(x, w, bias, None, 3, gate, False, 1.0)
        want = route_reference(row.view(1, 1, E).to(device), bias, None, 3, gate, False, 1.0)
        assert torch.equal(got.index_THK.long(), want.index_THK)
        assert torch.equal(got.counts_HE, want.counts_HE)
        for name, a, b in zip(Routed._fields[1:5], got[1:5], want[1:5], strict=True):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-5, equal_nan=True), (name, row, a, b)


def test_nan_stays_in_its_token(device):
    x, w, bias = make(5, 2, 10, 16, device)
    x.data[3, 0, 7] = torch.nan
    got = route(x, w, bias, None, *OPTIONS)
    assert got.index_THK[3, 0].tolist() == [0, 1, 2]
    assert got.gate_THK[3, 0].isnan().all() and int(got.gate_THK.isnan().sum()) == 3
    assert got.prob_HE[0].isnan().all() and got.prob_HE[1].isfinite().all()
    dx = torch.autograd.grad(got.gate_THK.square().sum(), x)[0]
    assert dx[3, 0].isnan().all() and int(dx.isnan().any(-1).sum()) == 1


def test_all_tokens_choose_one_expert(device):
    x, w, bias = make(40, 1, 9, 16, device)
    bias[0, 4] = 1e3
    got = check(x, w, bias, None, (1, "sigmoid", False, 1.0))
    assert got.counts_HE.tolist() == [[0.0] * 4 + [40.0] + [0.0] * 4]


@pytest.mark.parametrize("gate, E", [("topk_softmax", 12), ("sigmoid", 70)])
def test_replays_an_index(gate, E, device):
    x, w, bias = make(12, 2, E, 16, device)
    index = torch.rand(12, 2, E).argsort(-1)[..., :3].to(device)
    got = check(x, w, bias, index, (3, gate, True, 2.0))
    assert torch.equal(got.index_THK.long(), index)
    index[4, 1, 2] = E
    broken = route(x, w, bias, index.int(), 3, "sigmoid", False, 2.0).gate_THK
    assert broken.isnan().nonzero().tolist() == [[4, 1, 2]]


def test_reads_by_strides_and_gives_the_same_bits_twice(device):
    x, w, bias = make(20, 2, 10, 16, device)
    plain = route(x, w, bias, None, *OPTIONS)
    plain = (*plain, *back(plain, ("gate_THK", "prob_HE"), x, w))
    by_head = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.cat([x.detach(), x.detach()], -1)[..., 16:]
    for other in (x.detach().clone(), by_head, sliced):
        other.requires_grad_()
        got = route(other, w, bias, None, *OPTIONS)
        got = (*got, *back(got, ("gate_THK", "prob_HE"), other, w))
        assert all(torch.equal(a, b) for a, b in zip(plain, got, strict=True))


def test_no_tokens(device):
    x, w, bias = make(0, 2, 5, 16, device)
    got = route(x, w, bias, None, *OPTIONS)
    assert got.index_THK.shape == (0, 2, 3)
    assert all((t == 0).all() and t.isfinite().all() for t in got[2:])
    dx, dw = back(got, ("gate_THK", "prob_HE"), x, w)
    assert dx.shape == x.shape and (dw == 0).all()


@pytest.mark.parametrize("gate, floats", [("topk_softmax", 4), ("softmax_topk", 4), ("sigmoid", 5)])
def test_keeps_tokens_index_and_a_float_per_slot(gate, floats, device):
    """Per sub-token: x, K indices, K gates or logits, and the row's one or two sums."""
    T, H, E, L, K = 10, 2, 12, 16, 3
    x, w, bias = make(T, H, E, L, device, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        got = route(x, w, bias, None, K, gate, True, 1.0)
    inputs = {x.data_ptr(), w.data_ptr()}
    assert inputs <= {t.data_ptr() for t in kept}
    extra = [t for t in kept if t.data_ptr() not in inputs]
    assert sum(t.numel() * t.element_size() for t in extra) == 4 * T * H * (K + floats)
    if gate == "topk_softmax":  # the gates themselves, which the experts keep as well
        assert got.gate_THK.data_ptr() in {t.data_ptr() for t in extra}


def test_is_a_well_formed_custom_operator(device):
    x, w, bias = make(6, 2, 12, 16, device)
    op = torch.ops.headway.route_tokens.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (x, w, bias, None, *OPTIONS), test_utils=checks)
    index = torch.zeros(6, 2, 2, dtype=torch.int64, device=device)
    torch.library.opcheck(op, (x, w, bias, index, 3, "sigmoid", True, 2.0), test_utils=checks)
    out = op(x, w, bias, None, 3, "sigmoid", True, 2.0)
    saved = tuple(t.detach() for t in (x, w, *out[5:]))
    grads = (torch.rand(6, 2, 3).to(device), torch.rand(2, 12).to(device), None)
    backward = torch.ops.headway.route_tokens_backward.default
    torch.library.opcheck(backward, (*saved, *grads, "sigmoid", True, 2.0), test_utils=checks)


@pytest.mark.filterwarnings("error:Dynamo detected a call")  # to a function that remembers
def test_a_router_compiles_whole_and_equals_eager(device):
    router = Router(32, MoEConfig(n_heads=2, n_experts=10, top_k=3), Compute(recompute=True)).to(
        device
    )
    init_weights(router, seed=0)
    x = torch.randn(6, 2, 16, device=device)
    results = []
    for call in (torch.compile(router, fullgraph=True, backend="aot_eager"), router):
        got = call(x)
        loss = got.gate_THK.square().sum() + got.stats.prob_HE.square().sum()
        d_w = torch.autograd.grad(loss, router.w_HEL)[0]
        results.append((got.index_THK, got.gate_THK, *got.stats[:4], d_w))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_needs_logits_takes_the_other_path(device):
    x = torch.randn(6, 2, 16, device=device)
    fused = []
    for config, balance in (
        (RouterConfig(), BalanceConfig()),
        (RouterConfig(jitter=0.1), BalanceConfig()),
        (RouterConfig(noisy=True), BalanceConfig()),
        (RouterConfig(), BalanceConfig(bias="quantile", aux=0.0)),
        (RouterConfig(), BalanceConfig(aux_scope="sequence")),
    ):
        router = Router(
            32, MoEConfig(n_heads=2, n_experts=10, top_k=3, router=config, balance=balance)
        ).to(device)
        init_weights(router, seed=0)
        fused.append(router(x).index_THK.dtype == torch.int32)
    assert fused == [True, False, False, False, False]
    assert router.double()(x.double()).gate_THK.dtype == torch.float64
