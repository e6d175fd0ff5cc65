import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import MoEConfig
from headway.kernels import route as module
from headway.kernels.route import Routed, route_logits, route_reference
from headway.kernels.topk import top_k
from headway.model.init import init_weights
from headway.model.router import Router
from tests.compare import assert_close, relative_error
from tests.kernels.cpp_paths import needs_native, switch_off, threads

GATES = ("topk_softmax", "softmax_topk", "sigmoid")
WITH_GRADIENT = ("gate_THK", "prob_HE", "z_H")


def make(T, H, E, by_head=False, spread=2.0):
    """Logits as a linear layer over tokens, or a batched matmul over heads, leaves them; a bias."""
    logits = spread * (torch.randn(H, T, E).transpose(0, 1) if by_head else torch.randn(T, H, E))
    return logits.requires_grad_(), torch.randn(H, E)


def back(routed: Routed, logits, names=WITH_GRADIENT):
    """The gradient of the logits through some outputs, each with random weights."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=logits.dtype)
    for name in names:
        out = routed._asdict()[name]
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        total = total + (out * weight.to(out.dtype)).sum()
    return torch.autograd.grad(total, logits)[0]


def check(logits, bias, index, options, names=WITH_GRADIENT):
    """`route_logits` beside the reference in float64 with the same experts; where scores or differences
    of them leave float32, at least as good as the reference in float32."""
    got = route_logits(logits, bias, index, *options)
    wide = logits.detach().double().requires_grad_()
    want = route_reference(wide, bias.double(), got.index_THK, *options)
    rival = route_reference(logits, bias, got.index_THK, *options)
    for name, a, b, c in zip(Routed._fields, got, want, rival, strict=True):
        assert a.dtype == (torch.int64 if name == "index_THK" else torch.float32)
        if name == "entropy_H":  # to 1e-7 of the greatest entropy
            a, b, c = a + 1, b + 1, c + 1
        assert_close(a, b, max(3e-6, 2 * relative_error(c, b)))
    if logits.numel():
        d, d_rival = back(got, logits, names), back(rival, logits, names)
        d_want = back(want, wide, names)
        assert_close(d, d_want, max(3e-6, 4 * relative_error(d_rival, d_want)))
    return got


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_float64_and_chooses_as_the_reference(data):
    draw = data.draw
    T, H, E = draw(st.integers(1, 150)), draw(st.integers(1, 3)), draw(st.integers(2, 70))
    gate, renormalize = draw(st.sampled_from(GATES)), draw(st.booleans())
    constant = gate == "topk_softmax" or renormalize  # with k = 1, as in a Router
    k = draw(st.integers(2 if constant else 1, E))
    options = (k, gate, renormalize, draw(st.sampled_from([1.0, 2.5])))
    torch.manual_seed(draw(st.integers(0, 1000)))
    logits, bias = make(T, H, E, draw(st.booleans()), draw(st.sampled_from([0.1, 1.0, 8.0])))
    bias = bias * draw(st.sampled_from([0.0, 1.0]))
    got = check(logits, bias, None, options)
    want = route_reference(logits, bias, None, *options).index_THK
    if gate != "sigmoid":
        assert torch.equal(got.index_THK, want)
    # σ differs in its last bit between PyTorch's own vector and scalar code
    score = torch.sigmoid(logits) if gate == "sigmoid" else logits
    a, b = ((score + bias).gather(-1, index) for index in (got.index_THK, want))
    assert float((a - b).detach().abs().max()) <= 3e-7


@pytest.mark.parametrize("names", [("gate_THK",), ("prob_HE",), ("z_H",), ("prob_HE", "z_H")])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gradient_of_some_outputs(gate, renormalize, names):
    logits, bias = make(75, 2, 39)
    if gate == "topk_softmax" and renormalize and names == ("gate_THK",):
        names = ("gate_THK", "z_H")
    check(logits, bias, None, (8, gate, renormalize, 1.5), names=names)


@pytest.mark.parametrize("native_path", [True, False])
@pytest.mark.parametrize("T, H, E, k", [(2048, 2, 39, 8), (300, 1, 512, 22), (1, 4, 128, 1)])
@pytest.mark.parametrize("gate", GATES)
def test_both_paths_at_real_sizes(gate, T, H, E, k, native_path, monkeypatch):
    if not native_path:
        switch_off(monkeypatch, module)
    logits, bias = make(T, H, E)
    check(logits, 0.1 * bias, None, (k, gate, k > 1, 1.0))


@needs_native
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="PyTorch has another exponential on this CPU",
)
def test_sigmoid_chooses_as_pytorch():
    """Bit for bit the same scores: a last bit would choose differently in some of these rows."""
    logits = torch.randn(64 * 1024, 1, 16) * 0.01
    bias = torch.zeros(1, 16)
    got = route_logits(logits, bias, None, 5, "sigmoid", False, 1.0)
    with threads(1):
        assert torch.equal(got.index_THK, top_k(torch.sigmoid(logits), 5))


VALUES = [-3.0, -1.0, -0.0, 0.0, 0.5, 2.0, float("inf"), float("-inf"), float("nan")]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 20), st.data())
def test_ties_nan_and_inf_are_chosen_as_by_top_k(n_experts, data):
    row = st.lists(st.sampled_from(VALUES), min_size=n_experts, max_size=n_experts)
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=20))).unsqueeze(1)
    k = data.draw(st.integers(1, n_experts))
    bias = torch.zeros(1, n_experts)
    got = route_logits(logits, bias, None, k, "softmax_topk", False, 1.0)
    want = route_reference(logits, bias, None, k, "softmax_topk", False, 1.0)
    assert torch.equal(got.index_THK, want.index_THK)
    assert torch.equal(got.counts_HE, want.counts_HE)
    for a, b in zip(got[1:5], want[1:5], strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5, equal_nan=True)


def test_ties_go_to_the_lowest_index():
    for gate in GATES:
        got = route_logits(torch.zeros(40, 2, 20), torch.zeros(2, 20), None, 11, gate, False, 1.0)
        assert torch.equal(got.index_THK, torch.arange(11).expand(40, 2, 11))


def test_nan_stays_in_its_token():
    logits, bias = make(20, 2, 10)
    logits.data[3, 0, 7] = torch.nan
    got = route_logits(logits, bias, None, 3, "topk_softmax", False, 1.0)
    assert got.index_THK[3, 0, 0] == 7
    assert got.gate_THK[3, 0].isnan().all() and int(got.gate_THK.isnan().sum()) == 3
    assert got.prob_HE[0].isnan().all() and got.prob_HE[1].isfinite().all()
    d = torch.autograd.grad(got.gate_THK.sum() + got.z_H[1], logits)[0]
    assert d[[2, 4]].isfinite().all() and d[3, 0, got.index_THK[3, 0]].isnan().all()


@pytest.mark.parametrize("gate", GATES)
def test_an_expert_that_no_token_may_choose(gate):
    logits, bias = make(30, 2, 12)
    logits.data[..., 5] = -torch.inf
    check(logits, bias, None, (4, gate, False, 1.0))
    got = route_logits(logits, bias, None, 4, gate, False, 1.0)
    assert (got.prob_HE[:, 5] == 0).all() and (back(got, logits)[..., 5] == 0).all()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("level", [-200.0, -50.0, 80.0])
def test_logits_far_from_zero(gate, level):
    logits, bias = make(30, 2, 12)
    logits.data.add_(level)
    check(logits, torch.zeros_like(bias), None, (4, gate, True, 1.0))


@pytest.mark.parametrize("gate", GATES)
def test_replays_an_index(gate):
    logits, bias = make(50, 2, 9)
    index = torch.rand(50, 2, 9).argsort(-1)[..., 2:5]
    index[:, :, 1] = index[:, :, 0]  # even the same expert twice
    got = check(logits, bias, index, (4, gate, True, 2.0))
    assert torch.equal(got.index_THK, index)
    with pytest.raises((IndexError, RuntimeError)):
        route_logits(logits, bias, index + 5, 4, gate, True, 2.0)


@pytest.mark.parametrize("gate", GATES)
def test_one_expert(gate):
    logits, bias = make(40, 2, 1)
    got = route_logits(logits, bias, None, 1, gate, True, 3.0)
    assert (got.index_THK == 0).all() and (got.gate_THK == 3).all()
    assert_close(got.prob_HE, torch.ones(2, 1), 1e-6)
    assert (got.counts_HE == 40).all() and (got.entropy_H.abs() < 1e-6).all()
    assert_close(got.z_H, logits.square().mean((0, 2)), 1e-6)
    assert_close(torch.autograd.grad(got.z_H.sum(), logits)[0], logits / 20, 1e-6)


def test_no_tokens():
    logits, bias = make(0, 2, 5)
    got = route_logits(logits, bias, None, 2, "topk_softmax", False, 1.0)
    assert (got.counts_HE == 0).all() and (got.prob_HE == 0).all()
    assert got.index_THK.shape == (0, 2, 2)
    assert back(got, logits).shape == logits.shape


def test_statistics_that_balance_nothing_have_no_gradient():
    logits, bias = make(6, 2, 5)
    got = route_logits(logits, bias, None, 2, "topk_softmax", False, 1.0)
    assert [t.requires_grad for t in got] == [False, True, True, True, False, False]


@needs_native  # PyTorch's sums over tokens depend on the threads
@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_the_same_bits_on_any_number_of_threads_and_in_both_layouts(gate, by_head):
    logits, bias = make(1000, 2, 39, by_head)
    options = (8, gate, True, 1.0)
    results = []
    for n in (1, 2, 2, 3):
        with threads(n):
            got = route_logits(logits, bias, None, *options)
            results.append((*got, back(got, logits)))
    laid = logits.contiguous() if by_head else logits.transpose(0, 1).contiguous().transpose(0, 1)
    other = laid.detach().requires_grad_()
    got = route_logits(other, bias, None, *options)
    results.append((*got, back(got, other)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@needs_native
def test_keeps_logits_and_index_only():
    logits, bias = make(64, 2, 39)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        got = route_logits(logits, bias, None, 8, "sigmoid", True, 1.0)
    assert {t.data_ptr() for t in kept} == {logits.data_ptr(), got.index_THK.data_ptr()}


@needs_native
@pytest.mark.parametrize("by_head", [True, False])
def test_is_a_well_formed_custom_operator(by_head):
    logits, bias = make(20, 2, 12, by_head)
    op = torch.ops.headway.route.default
    torch.library.opcheck(op, (logits, bias, None, 3, "sigmoid", True, 2.0))
    index = top_k(logits, 4)
    torch.library.opcheck(op, (logits, bias, index, 3, "topk_softmax", False, 1.0))
    gate = torch.rand(20, 2, 4)
    grads = (gate, torch.rand(2, 12), None)
    arguments = (logits.detach(), index, *grads, "softmax_topk", True, 2.0)
    torch.library.opcheck(torch.ops.headway.route_backward.default, arguments)


def test_a_router_compiles_whole_and_equals_eager():
    router = Router(12, MoEConfig(n_heads=2, n_experts=10, top_k=3))
    init_weights(router, seed=0)
    x = torch.randn(40, 2, 6)
    results = []
    for call in (torch.compile(router, fullgraph=True), router):
        got = call(x)
        stats = got.stats
        loss = got.gate_THK.square().sum() + stats.prob_HE.square().sum() + stats.z_H.sum()
        d_w = torch.autograd.grad(loss, router.w_HEL)[0]
        results.append((got.index_THK, got.gate_THK, stats.prob_HE, stats.counts_HE, d_w))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-6)
