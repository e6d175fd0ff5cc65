"""The layers in other people's code: what PyTorch can do with a module, it can do with these.

Every test compares numbers with the layer used plainly, or with its equations in float64.
Derivatives of other kinds are in `test_drop_in_func.py`, launchers in `parity/test_wrappers.py`.
"""

import copy
import dataclasses
import functools
import inspect
import io
import types

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from headway import BalanceConfig, LatentMoE, MoE, MultiHeadLatentMoE
from headway.config import MoEConfig, UsageError
from headway.kernels.cpp import cpp_kernels
from headway.model.balance import new_bias
from headway.model.context import Context
from headway.model.roles import stored_dtypes
from tests.compare import assert_close
from tests.drop_in import D, build, each_kind, equal, gradients, loss_of, tokens
from tests.model.layer_reference import layer_reference

# stored in another dtype


@each_kind
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_narrow_modules_equal_the_equations(kind, dtype, bound):
    """`layer.bfloat16()` and `.half()`: output and every gradient, by float64 of the same weights."""
    layer = build(kind, dtype)
    wanted = stored_dtypes(layer, dtype)
    assert {name: p.dtype for name, p in layer.state_dict().items()} == wanted
    assert wanted["experts.w_in_HEGFL"] == dtype and wanted["router.w_HEL"] == torch.float32
    x = tokens(40, dtype=dtype)
    _, chosen = layer_reference(build(kind, dtype).double(), x.double())
    out, stats = layer(x, Context(replay=(chosen,)))
    assert out.dtype == dtype and stats.prob_HE.dtype == stats.z_H.dtype == torch.float32
    wide = build(kind, dtype).double()
    wide.router.bias_HE.copy_(layer.router.bias_HE)
    assert_close(out, wide(x.double(), Context(replay=(chosen,)))[0], bound)
    d_out = tokens(40)
    own = x.clone().requires_grad_()
    got = torch.autograd.grad(
        layer(own, Context(replay=(chosen,)))[0], [own, *layer.parameters()], d_out.to(dtype)
    )
    own = x.double().requires_grad_()
    want = torch.autograd.grad(
        wide(own, Context(replay=(chosen,)))[0], [own, *wide.parameters()], d_out.to(dtype).double()
    )
    for a, b, p in zip(got, want, [x, *layer.parameters()], strict=True):
        assert a.dtype == p.dtype
        assert_close(a, b, bound)


CASTS = {
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "to": lambda layer: layer.to("cpu", torch.bfloat16),
    "type": lambda layer: layer.type(torch.bfloat16),
    "twice": lambda layer: layer.half().bfloat16(),
}


@each_kind
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_sends_no_token_to_other_experts(kind, cast):
    """The same tokens to the same experts with the same gates, bit for bit; a router that is rounded
    to bfloat16 sends some of these elsewhere."""
    layer = build(kind, n_experts=64)
    x = tokens(400).bfloat16()
    read = x if layer.reads_token else layer.split(x)
    want = layer.router(read)
    narrow = CASTS[cast](copy.deepcopy(layer))
    got = narrow.router(read)
    equal((got.index_THK, got.gate_THK), (want.index_THK, want.gate_THK))
    assert narrow.experts.w_in_HEGFL.dtype in (torch.bfloat16, torch.float16)
    assert torch.equal(narrow.router.w_HEL, layer.router.w_HEL)
    with torch.no_grad():
        layer.router.w_HEL.copy_(layer.router.w_HEL.bfloat16())
    assert not torch.equal(layer.router(read).index_THK, want.index_THK)


@each_kind
def test_a_cast_takes_gradients_along(kind):
    """Those of float32 parameters stay float32; the next step of an optimiser is possible."""
    layer, x = build(kind), tokens(40)
    loss_of(layer(x)).backward()
    want = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.bfloat16()
    for name, p in layer.named_parameters():
        if p.grad is not None:
            assert p.grad.dtype == p.dtype and torch.equal(p.grad, want[name].to(p.dtype))
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.float()
    assert {p.dtype for p in layer.parameters()} == {torch.float32}


@each_kind
def test_narrow_weights_serve_wide_tokens_and_the_other_way_round(kind):
    x = tokens(40)
    for stored, used, bound in (
        (torch.bfloat16, torch.float32, 1e-5),
        (torch.double, torch.float32, 1e-5),
    ):
        layer = build(kind, stored)
        out, _ = layer(x.to(used))
        assert out.dtype == used
        assert_close(out, copy.deepcopy(layer).double()(x.double())[0], bound)


@each_kind
def test_scores_stay_float32_and_the_bias_is_not_rounded_away(kind):
    """A step of the sign rule is below bfloat16's resolution at 1."""
    layer = build(kind, balance=BalanceConfig(aux=0, bias="sign", bias_rate=1e-3))
    with torch.no_grad():
        layer.router.bias_HE.fill_(1.0)
    layer.bfloat16()
    bias_HE = layer.router.bias_HE
    assert bias_HE.dtype == layer.router.w_HEL.dtype == torch.float32
    moved = new_bias(bias_HE, layer(tokens(40).bfloat16())[1], BalanceConfig(bias="sign"))
    bias_HE.copy_(moved)
    assert (layer.router.bias_HE - 1).abs().max() > 5e-4
    assert layer.double().router.bias_HE.dtype == torch.float64


@each_kind
def test_autocast_narrows_matmuls_and_not_scores(kind):
    """With the selection replayed, scores, gates and their statistics are those of float32."""
    layer, x = build(kind), tokens(60)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer.split(x)
        read = x if layer.reads_token else z
        route = layer.router(read)
        out, stats = layer(x)
        got = gradients(layer, x)
    want = layer.router(read.float())
    assert route.gate_THK.dtype == stats.prob_HE.dtype == torch.float32
    equal((route.index_THK, route.gate_THK), (want.index_THK, want.gate_THK))
    replay = Context(replay=(route.index_THK.long(),))
    assert_close(out, build(kind).double()(x.double(), replay)[0], 2e-2)
    for a, b in zip(got, [x, *layer.parameters()], strict=True):
        assert a.dtype == b.dtype == torch.float32


# torch.compile, export, graphs


@each_kind
def test_one_compiled_graph_for_all_token_counts(kind):
    """Outputs and gradients; the fast operators stay in the graphs of both directions."""
    torch._dynamo.reset()
    layer, graphs = build(kind), []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 9, 33):
        equal(gradients(layer, tokens(n), compiled), gradients(layer, tokens(n)), 1e-6)
    assert len(graphs) == 2
    if cpp_kernels().library is not None:
        assert "headway.experts.default" in graphs[0]
        assert "headway.experts_backward.default" in graphs[1]


@each_kind
def test_export(kind):
    layer = build(kind).eval()
    shapes = {"x": {0: torch.export.Dim("T", min=2)}}
    exported = torch.export.export(layer, (tokens(6),), dynamic_shapes=shapes)
    equal(exported.module()(tokens(21))[:1], layer(tokens(21))[:1])


# modules


@each_kind
def test_activation_checkpointing(kind):
    layer = build(kind)
    call = functools.partial(checkpoint, layer, use_reentrant=False)
    equal(gradients(layer, tokens(9), call), gradients(layer, tokens(9)))


@each_kind
def test_reentrant_activation_checkpointing(kind):
    """Which sees only the tensors that a function returns, not those in a tuple of them."""
    layer, found = build(kind), []
    for call in (layer, functools.partial(checkpoint, layer, use_reentrant=True)):
        layer.zero_grad()
        x = tokens(9).requires_grad_()
        call(x)[0].square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    equal(*found)


@each_kind
def test_copies_and_state_dicts(kind):
    layer, other = build(kind), build(kind)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    want = gradients(layer, tokens(9))
    for copied in (other, copy.deepcopy(layer), torch.load(file, weights_only=False)):
        equal(gradients(copied, tokens(9)), want)


@each_kind
def test_meta_device(kind):
    """Shapes without memory, then the weights of another."""
    layer = build(kind)
    with torch.device("meta"):
        empty = build(kind)
    assert empty(tokens(9).to("meta"))[0].shape == (9, D)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    equal(gradients(empty, tokens(9)), gradients(layer, tokens(9)))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens(kind, dtype):
    """As a rank without work has."""
    layer = build(kind, dtype)
    out, stats = layer(tokens(0, dtype=dtype))
    assert out.shape == (0, D) and (stats.counts_HE == 0).all() and (stats.prob_HE == 0).all()
    for g in gradients(layer, tokens(0, dtype=dtype)):
        assert (g == 0).all()


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_stays_in_its_token(kind, dtype):
    layer, x = build(kind, dtype), tokens(9, dtype=dtype)
    want, _ = layer(x)
    broken = x.clone()
    broken[4, 3] = float("nan")
    out, _ = layer(broken)
    assert out[4].isnan().any()
    others = [i for i in range(9) if i != 4]
    assert_close(out[others], want[others], 1e-6)


@each_kind
def test_layouts_of_the_input(kind):
    layer, x = build(kind), tokens(4, 6)
    want = layer(x)[0]
    equal([layer(x.transpose(0, 1))[0].transpose(0, 1)], [want], 1e-6)
    wide = torch.randn(4, 6, 2 * D)
    wide[..., ::2] = x
    equal([layer(wide[..., ::2])[0]], [want], 1e-6)
    equal([layer(x[:1, :1].expand(3, 5, D))[0]], [layer(x[0, 0])[0].expand(3, 5, D)], 1e-6)


@each_kind
def test_without_gradients(kind):
    layer, x = build(kind), tokens(9)
    want = layer(x)[0]
    with torch.no_grad():
        equal([layer(x)[0]], [want])
    with torch.inference_mode():
        equal([layer(x)[0]], [want])


@each_kind
@pytest.mark.parametrize("part", ["experts", "router", "shared"])
def test_frozen_parts(kind, part):
    """The others' gradients are as before."""
    layer, x = build(kind), tokens(9).requires_grad_()
    want = dict(zip(dict(layer.named_parameters()), gradients(layer, x)[1:], strict=True))
    layer.get_submodule(part).requires_grad_(False)
    loss_of(layer(x)).backward()
    for name, p in layer.named_parameters():
        assert p.grad is None if name.startswith(part) else torch.equal(p.grad, want[name])


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


@each_kind
def test_parametrised_weights(kind):
    layer, x = build(kind), tokens(9)
    plain = build(kind)
    with torch.no_grad():
        plain.experts.w_in_HEGFL /= 2
    parametrize.register_parametrization(layer.experts, "w_in_HEGFL", Halved())
    parametrizations.weight_norm(layer.router, "w_HEL")
    equal([layer(x)[0]], [plain(x)[0]], 1e-6)
    got = torch.autograd.grad(loss_of(layer(x)), layer.experts.parametrizations.w_in_HEGFL.original)
    want = torch.autograd.grad(loss_of(plain(x)), plain.experts.w_in_HEGFL)
    equal([2 * got[0]], want, 1e-5)


@each_kind
def test_hooks(kind):
    layer, x, seen = build(kind), tokens(9), []
    want = gradients(layer, x)
    layer.experts.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.experts.register_forward_hook(lambda *_: seen.append("after"))
    layer.experts.register_full_backward_hook(lambda *_: seen.append("back"))
    layer.experts.w_out_HEFL.register_hook(lambda g: seen.append("weight") or 2 * g)
    names = ["x", *dict(layer.named_parameters())]
    for name, got, plain in zip(names, gradients(layer, x), want, strict=True):
        assert torch.equal(got, 2 * plain if name == "experts.w_out_HEFL" else plain)
    assert seen[:2] == ["before", "after"] and sorted(seen[2:]) == ["back", "weight"]


@each_kind
def test_a_forward_that_a_launcher_wraps(kind):
    """As accelerate's `prepare`: autocast around `forward`, every float of the answer to float32."""
    layer, x = build(kind), tokens(9)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x)[0]
    inner = torch.autocast("cpu", torch.bfloat16)(layer.forward.__func__)

    def forward(self, *args):
        out, stats = inner(self, *args)
        return out.float(), stats.map(Tensor.float)

    layer.forward = types.MethodType(forward, layer)
    out, _ = layer(x)
    assert out.dtype == torch.float32
    equal([out], [want.float()])


# options


@pytest.mark.parametrize("layer", [MoE, LatentMoE, MultiHeadLatentMoE])
def test_every_option_of_a_recipe(layer):
    """What a recipe can say of the layer, its constructor can."""
    elsewhere = {"kind", "n_dense_layers", "sparse_step", "dense_layers"}
    if layer is not MultiHeadLatentMoE:
        elsewhere |= {"n_heads", "projection"}
    if layer is MoE:
        elsewhere |= {"d_latent", "latent_norm"}
    wanted = {field.name for field in dataclasses.fields(MoEConfig)} - elsewhere
    parameters = inspect.signature(layer).parameters
    assert wanted <= set(parameters)
    assert {"recompute"} | ({"norm_eps"} if layer is not MoE else set()) <= set(parameters)
    for name in wanted & {"precision", "activation", "capacity_factor", "latent_norm"}:
        assert parameters[name].default == getattr(MoEConfig(), name)


@each_kind
def test_float8_is_refused_where_it_cannot_run(kind):
    layer = build(kind, precision="float8")
    if torch.cuda.is_available():
        layer.cuda()
    with pytest.raises(UsageError, match="precision=float8 needs .*; use bfloat16"):
        layer(next(layer.parameters()).new_ones(3, D))


@pytest.mark.parametrize("kind", ["latent", "multi_head"])
def test_the_latent_norm_takes_eps(kind):
    layer, x = build(kind, torch.float64, norm_eps=0.5), tokens(9, dtype=torch.float64)
    z = layer.w_in(x).unflatten(-1, (layer.n_heads, -1))
    want = z / (z.square().mean(-1, keepdim=True) + 0.5).sqrt()
    equal([layer.split(x)], [want], 1e-12)
