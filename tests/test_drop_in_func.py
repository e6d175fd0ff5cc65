"""The layers under `torch.func`, forward mode and second derivatives: each against first derivatives
of the layer used plainly, which `test_drop_in.py` and `model/test_moe.py` hold to the equations.
"""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from headway import BalanceConfig, RouterConfig
from tests.drop_in import build, each_kind, equal, gradients, loss_of, tokens

OPTIONS = {
    "softmax": dict(router=RouterConfig()),
    "sigmoid": dict(router=RouterConfig(gate="sigmoid", renormalize=True, scale=2.0)),
    "relu2": dict(router=RouterConfig(gate="softmax_topk"), activation="relu2"),
    "gelu": dict(activation="gelu", balance=BalanceConfig(aux=0, bias="quantile")),
    "token": dict(router=RouterConfig(reads="token"), recompute=True),
    "capacity": dict(capacity_factor=0.6),
}
CASES = [("multi_head", name) for name in OPTIONS] + [("moe", "sigmoid"), ("latent", "token")]
each_case = pytest.mark.parametrize("kind, options", CASES)
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
each_precision = pytest.mark.parametrize("dtype, bound", PRECISIONS, ids=["float64", "float32"])


def functional(layer: nn.Module):
    """loss(parameters, x) of functional code, and the parameters."""
    kept = {name: p.detach() for name, p in layer.named_parameters()}
    return lambda p, x: loss_of(functional_call(layer, p, (x,))), kept


@each_case
@each_precision
def test_func_grad(kind, dtype, bound, options):
    layer, x = build(kind, dtype, **OPTIONS[options]), tokens(9, dtype=dtype)
    loss, parameters = functional(layer)
    d_parameters, dx = grad(loss, argnums=(0, 1))(parameters, x)
    equal([dx, *d_parameters.values()], gradients(layer, x), bound)


@each_case
@each_precision
def test_gradients_of_each_sample(kind, dtype, bound, options):
    """`vmap` of `grad` is a loop over samples; no operator falls back to one, which PyTorch says."""
    layer, x = build(kind, dtype, **OPTIONS[options]), tokens(3, 7, dtype=dtype)
    loss, parameters = functional(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        equal([g[i] for g in found.values()], gradients(layer, x[i])[1:], bound)


@each_kind
@each_precision
def test_an_ensemble_is_a_loop_over_its_members(kind, dtype, bound):
    """`vmap` over stacked parameters."""
    members = [build(kind, dtype), build(kind, dtype)]
    with torch.no_grad():
        for p in members[1].parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    parameters, buffers = torch.func.stack_module_state(members)
    x = tokens(9, dtype=dtype)
    call = lambda p, b: functional_call(members[0], (p, b), (x,))[0]  # noqa: E731
    equal(vmap(call)(parameters, buffers), [m(x)[0] for m in members], bound)


@each_case
@each_precision
def test_forward_mode(kind, dtype, bound, options):
    """The tangent of the loss is its gradient times the direction, by `jvp` and by dual tensors."""
    layer, x = build(kind, dtype, **OPTIONS[options]), tokens(9, dtype=dtype)
    direction = torch.randn_like(x)
    want = (gradients(layer, x)[0] * direction).sum()
    _, got = jvp(lambda x: loss_of(layer(x)), (x,), (direction,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss_of(layer(forward_ad.make_dual(x, direction)))).tangent
    for tangent in (got, dual):
        assert tangent.item() == pytest.approx(want.item(), rel=10 * bound)


@each_case
def test_second_derivatives(kind, options):
    """By finite differences, of outputs and statistics, for x and every parameter."""
    layer = build(kind, torch.float64, **OPTIONS[options])
    x = tokens(3, dtype=torch.float64).requires_grad_()
    parameters = dict(layer.named_parameters())

    def call(x, *values):
        out, stats = functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))
        return out, stats.prob_HE, stats.z_H

    inputs = (x, *parameters.values())
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, check_fwd_over_rev=True)


@each_case
def test_second_derivatives_in_float32(kind, options):
    """A gradient penalty, as trained in float32 and in float64: through the C++ kernels where the
    machine has them."""

    def penalty(dtype: torch.dtype) -> tuple[Tensor, ...]:
        layer, x = build(kind, dtype, **OPTIONS[options]), tokens(9, dtype=dtype).requires_grad_()
        loss = loss_of(layer(x))
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + dx.square().sum(), [x, *layer.parameters()])

    equal(penalty(torch.float32), penalty(torch.float64), 2e-5)


@each_kind
def test_hessians_and_third_derivatives(kind):
    layer, x = build(kind, torch.float64), tokens(1, dtype=torch.float64)
    loss = lambda x: loss_of(layer(x))  # noqa: E731
    want = jacfwd(grad(loss))(x)
    equal((hessian(loss)(x), jacrev(grad(loss))(x)), (want, want), 1e-12)
    dx = x.requires_grad_()
    for _ in range(3):
        (dx,) = torch.autograd.grad(dx.sum() if dx is not x else loss(x), x, create_graph=True)
    equal([dx], [grad(lambda x: grad(lambda x: grad(loss)(x).sum())(x).sum())(x)], 1e-11)


def test_a_compiled_vmap_of_grad():
    layer, x = build("multi_head"), tokens(3, 7)
    loss, parameters = functional(layer)
    each = vmap(grad(loss), in_dims=(None, 0))
    compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
    equal(compiled(parameters, x).values(), each(parameters, x).values(), 1e-6)
