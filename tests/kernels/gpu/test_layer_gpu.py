"""A whole sparse layer on the GPU's kernels: no host sync, whole under torch.compile, in a graph."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from headway.config import BalanceConfig, RouterConfig
from headway.model.balance import balance_loss
from headway.model.layers import MoE, MultiHeadLatentMoE
from tests.compare import assert_close

AUX = BalanceConfig(aux=0.01, z=1e-3)
LAYERS = {
    "heads": lambda: MultiHeadLatentMoE(64, 2, 5, 3, 32, balance=AUX, recompute=True),
    "heads, token, sigmoid": lambda: MultiHeadLatentMoE(
        64,
        2,
        4,
        1,
        16,
        router=RouterConfig(reads="token", gate="sigmoid"),
        activation="gelu",
        recompute=True,
    ),
    "flat": lambda: MoE(64, 6, 2, 48, activation="relu2", balance=AUX, recompute=True),
}


def made(name, device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    with torch.device(device):
        layer = LAYERS[name]()
    x = torch.randn(24, 64, device=device).to(dtype).requires_grad_()
    return layer, x


def step(layer, x, d_out):
    out, stats = layer(x)
    loss = (out * d_out).float().sum() + balance_loss([stats], AUX)
    return out, torch.autograd.grad(loss, [x, *layer.parameters()])


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_equals_its_float64_form(device, name):
    """The whole layer: the other path of every kernel file, in float64, from the same weights. A token
    whose bfloat16 sub-token chooses other experts would show as a large error."""
    layer, x = made(name, device, torch.float32)
    d_out = torch.randn_like(x)
    out, grads = step(layer, x, d_out)
    torch.manual_seed(0)
    wide = LAYERS[name]().to(device).double()
    wide.load_state_dict(layer.state_dict())
    expected, expected_grads = step(wide, x.detach().double().requires_grad_(), d_out.double())
    assert_close(out, expected, 1e-5)
    names = ["x", *(n for n, _ in layer.named_parameters())]
    for n, got, want in zip(names, grads, expected_grads, strict=True):
        error = float((got.double() - want).norm() / want.norm())
        assert error < 2e-5, f"{n}: {error:.1e}"


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_penalty_and_torch_func_take_the_other_path(device, name):
    """The kernels have first gradients only."""
    found = []
    for dtype in (torch.float32, torch.float64):
        layer, x = made(name, device, torch.float32)
        layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()

        def loss(x, layer=layer):
            out, stats = layer(x)
            return out.square().sum() + balance_loss([stats], AUX)

        (dx,) = torch.autograd.grad(loss(x), x, create_graph=True)
        second = torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()])
        assert_close(torch.func.grad(loss)(x.detach()), dx, 1e-5)
        found.append(second)
    for got, want in zip(*found, strict=True):
        assert_close(got, want, 5e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_waits_for_the_device(device, name):
    """With fake tensors there is nothing to read: a shape or a branch that follows the data fails."""
    with FakeTensorMode():
        layer, x = made(name, device)
        out, grads = step(layer, x, torch.empty_like(x))
    assert out.shape == x.shape and [g.shape for g in grads[1:]] == [
        p.shape for p in layer.parameters()
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_torch_compile_takes_it_whole(device, name):
    layer, x = made(name, device)
    d_out = torch.randn_like(x)
    out, grads = step(layer, x, d_out)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, got_grads = step(compiled, x, d_out)
    assert_close(got, out, 1e-6)
    for a, b in zip(got_grads, grads, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_captured_step_is_the_step(name):
    """Forward and backward in one CUDA graph; replayed on other tokens, which go to other experts."""
    layer, x = made(name, "cuda")
    d_out = torch.randn_like(x)
    other = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x, d_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = step(layer, x, d_out)
    for tokens in (x.detach().clone(), other):
        with torch.no_grad():
            x.copy_(tokens)
        graph.replay()
        expected, expected_grads = step(layer, x, d_out)
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_the_host_never_waits(name):
    layer, x = made(name, "cuda")
    d_out = torch.randn_like(x)
    step(layer, x, d_out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, d_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
