"""The rivals of bench/gpu_layer.py compute what they should: a race against a wrong one is none."""

import importlib.util

import pytest
import torch

from headway.kernels.experts import experts_reference
from headway.kernels.gpu import _gpu, gpu
from tests.compare import assert_close


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("here kernels are compiled")
    monkeypatch.setenv("HEADWAY_TRITON", "interpret")
    _gpu.cache_clear()
    assert gpu().device == "cpu", gpu().why
    yield
    _gpu.cache_clear()


def inputs(T, H, E, K, L, F, activation, dtype):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    G = 2 if activation == "swiglu" else 1
    tensors = (
        draw(T, H, L),
        torch.rand(T, H, K, generator=g),
        draw(H, E, G, F, L) / L**0.5,
        draw(H, E, F, L) / F**0.5,
    )
    index = torch.rand(T, H, E, generator=g).argsort(-1)[..., :K]
    index[:, 0] = index[:, 0] % max(E - 1, K)  # an expert without rows
    x, *rest = tensors
    return [x.to(dtype).requires_grad_(), *(t.requires_grad_() for t in rest)], index, draw(T, H, L)


RIVALS = {
    # bfloat16 where that is all they can; FlexAttention adds 1 to each hidden unit and takes it off again
    "grouped": ("swiglu", torch.bfloat16, 1e-2),
    "loop": ("swiglu", torch.float32, 1e-5),
    "flex": ("gelu", torch.float32, 1e-4),
    "liger": ("swiglu", torch.float32, 1e-3),
}


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_equals_the_reference(name, monkeypatch):
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")  # read at import; tuning needs a GPU
    if name == "liger" and not importlib.util.find_spec("liger_kernel"):
        pytest.skip("liger-kernel is not installed")
    from bench import gpu_rivals

    activation, dtype, bound = RIVALS[name]
    made, index, d_out = inputs(24, 2, 3, 2, 32, 128, activation, dtype)
    forward_only = (
        name == "flex" and not torch.cuda.is_available()
    )  # torch has no backward of it on CPUs
    given = [t.detach() if forward_only else t for t in made]
    out = getattr(gpu_rivals, name)(given[0], given[1], index, *given[2:], activation)
    grads = () if forward_only else torch.autograd.grad(out, made, d_out.to(out.dtype))
    wide = [t.detach().double().requires_grad_() for t in made]
    args = (wide[0].flatten(0, 1), wide[1].flatten(0, 1), index, *wide[2:], activation)
    expected = experts_reference(*args).view(d_out.shape)
    expected_grads = torch.autograd.grad(expected, wide, d_out.to(out.dtype).double())
    for got, want in zip((out, *grads), (expected, *expected_grads), strict=not forward_only):
        assert_close(got, want, bound)


def test_rivals_are_offered_where_they_can_run():
    from bench.gpu_rivals import rivals

    assert "FlexAttention" in rivals("gelu", 64, 256)
    assert "FlexAttention" not in rivals("swiglu", 64, 256) | rivals("gelu", 64, 192)
    assert "dense loop" in rivals("gelu", 64, 256) and "dense loop" not in rivals("gelu", 8192, 256)


@pytest.mark.parametrize("k", [2, 4])
def test_routers_choose_what_float64_chooses(k):
    from bench.gpu_rival_routers import route_ieee, route_naive

    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(70, 2, 64, generator=g), torch.randn(2, 100, 64, generator=g)
    score = torch.einsum("thl,hel->the", x.double(), w.double())
    top = score.topk(k, dim=-1)
    for route in (route_naive, route_ieee):
        index, gate = route(x, w, k)
        assert torch.equal(index, top.indices), route.__name__
        assert_close(gate, torch.softmax(top.values, -1), 1e-5)
