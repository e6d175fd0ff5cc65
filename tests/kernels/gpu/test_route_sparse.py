"""The router's backward where only the chosen logits have a gradient: by slots and by experts, both
beside float64."""

import pytest
import torch

from headway.kernels.gpu.tune import Tiles
from headway.kernels.route import route
from tests.compare import assert_close
from tests.kernels.gpu.test_route_gpu import back, check, make

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of log 0 and the like

GATES = ("gate_THK",)


@pytest.fixture(params=["by slots", "by experts"])
def way(request, monkeypatch) -> str:
    """Takes one of the two, whatever the shape."""
    go_by(request.param, monkeypatch)
    return request.param


def go_by(way: str, monkeypatch) -> None:
    from headway.kernels.gpu import route_sparse

    monkeypatch.setattr(route_sparse, "reads_less", lambda *shape: way == "by slots")


@pytest.mark.parametrize(
    "T, H, E, L, k, dtype, gate, renormalize, shared",
    [
        (37, 2, 21, 16, 1, "float32", "sigmoid", False, False),
        (19, 2, 39, 24, 2, "bfloat16", "topk_softmax", False, False),
        (7, 2, 12, 150, 3, "float32", "topk_softmax", False, True),
        (21, 3, 9, 40, 3, "bfloat16", "sigmoid", True, True),
        (40, 1, 70, 33, 8, "bfloat16", "sigmoid", True, False),
    ],
)
def test_equals_float64(T, H, E, L, k, dtype, gate, renormalize, shared, device, way):
    torch.manual_seed(0)
    x, w, bias = make(T, H, E, L, device, getattr(torch, dtype), shared)
    check(x, w, bias, None, (k, gate, renormalize, 1.5), GATES)


@pytest.mark.parametrize("k", [1, 3])
def test_one_expert_has_every_token_and_is_summed_in_parts(k, device, way, monkeypatch):
    from headway.kernels.gpu import route_sparse

    monkeypatch.setattr(route_sparse, "LEAST", 8)
    monkeypatch.setattr(route_sparse, "SPLITS", 40)
    torch.manual_seed(0)
    x, w, bias = make(300, 2, 9, 16, device)  # 38 partial sums, more than a program adds at once
    bias[:, 4] = 1e3
    got = check(x, w, bias, None, (k, "sigmoid", False, 1.0), GATES)
    assert (got.counts_HE[:, 4] == 300).all() and (k > 1 or got.counts_HE.sum() == 600)


def test_ties(device, way):
    """Small integers: every product is exact, and many scores are equal."""
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (
        torch.randint(-1, 2, shape, generator=generator).float().to(device)
        for shape in ((20, 2, 4), (2, 30, 4), (2, 30))
    )
    options = (3, "topk_softmax", False, 1.0)
    check(x.requires_grad_(), w.requires_grad_(), bias, None, options, GATES)


def test_an_index_that_is_no_expert_adds_nothing(device, monkeypatch):
    torch.manual_seed(0)
    x, w, bias = make(12, 2, 20, 16, device)
    index = torch.rand(12, 2, 20).argsort(-1)[..., :3].to(device)
    index[4, 1, 2], index[5, 0, 0] = 20, -1
    found = []
    for way in ("by slots", "by experts"):
        go_by(way, monkeypatch)
        gate_THK = route(x, w, bias, index, 3, "sigmoid", False, 1.0).gate_THK
        d_gate = torch.where(
            gate_THK.isnan(), 0.0, torch.linspace(1, 2, 72, device=device).view(12, 2, 3)
        )
        found.append(torch.autograd.grad(gate_THK, (x, w), d_gate))
    for a, b in zip(*found, strict=True):
        assert b.isfinite().all() and b.norm() > 0
        assert_close(a, b, 1e-6)


def test_no_tokens(device, way):
    x, w, bias = make(0, 2, 5, 16, device)
    dx, dw = back(route(x, w, bias, None, 2, "sigmoid", False, 1.0), GATES, x, w)
    assert dx.shape == x.shape and (dw == 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_reads_by_strides_and_gives_the_same_bits_twice(shared, device, way):
    """Other strides are another program, whose threads may add in another order."""
    torch.manual_seed(0)
    x, w, bias = make(20, 2, 10, 16, device, shared=shared)
    options = (3, "topk_softmax", False, 1.0)
    plain = back(route(x, w, bias, None, *options), GATES, x, w)
    by_head = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.cat([x.detach(), x.detach()], -1)[..., 16:]
    for other in (x.detach().clone(), by_head, sliced):
        other.requires_grad_()
        got = back(route(other, w, bias, None, *options), GATES, other, w)
        for a, b in zip(plain, got, strict=True):
            assert_close(b, a, 0.0 if other.stride() == x.stride() else 1e-6)


def test_only_sparse_gradients_of_many_experts_go_by_slots(device, monkeypatch):
    from headway.kernels.gpu import route_sparse

    taken, backward = [], route_sparse.backward
    monkeypatch.setattr(
        route_sparse, "backward", lambda *a: taken.append(a[1].shape[1]) or backward(*a)
    )
    torch.manual_seed(0)
    for E in (20, 300):
        x, w, bias = make(5, 1, E, 16, device)
        for gate, names in (
            ("sigmoid", GATES),
            ("sigmoid", ("gate_THK", "z_H")),
            ("sigmoid", ("prob_HE",)),
            ("softmax_topk", GATES),
        ):
            check(x, w, bias, None, (1, gate, False, 1.0), names)
    assert taken == [300]


def test_the_count():
    """Equal near E = 60·K, at the tiles of bfloat16 and L = 128."""
    from headway.kernels.gpu.route_sparse import reads_less

    cut = Tiles(64, 32, 8, 2)
    for K in (1, 2, 4, 8):
        assert not reads_less(40 * K, 128, K, 2, cut, cut)
        assert reads_less(75 * K, 128, K, 2, cut, cut)
    assert reads_less(256, 128, 4, 2, cut, cut)  # 4·(6·128 + 280) bytes against 256·(8 + 8 + 2)


@pytest.mark.parametrize("T, K", [(1, 1), (300, 3), (65536, 8), (2**20, 1)])
def test_an_expert_has_a_bounded_number_of_blocks(T, K):
    """Also if every slot of a head goes to it."""
    from headway.kernels.gpu.route_sparse import LEAST, SPLITS, block_rows

    block = block_rows(T * K)
    assert -(-T * K // block) <= SPLITS
    assert block == LEAST or block < 2 * T * K / (SPLITS - 1)
