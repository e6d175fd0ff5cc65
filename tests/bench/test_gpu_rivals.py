"""The rivals of bench/gpu_day.py compute what they should: a race against a wrong one is none."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from bench import gpu_rivals
from bench.gpu_rivals import flex, grouped, liger, loop, rivals
from bench.gpu_scattermoe import scattermoe
from headway.kernels.experts import experts_reference
from headway.kernels.gpu import _gpu_kernels, gpu_kernels
from tests.compare import assert_close


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("here kernels are compiled")
    monkeypatch.setenv("HEADWAY_TRITON", "interpret")
    _gpu_kernels.cache_clear()
    assert gpu_kernels().device == "cpu", gpu_kernels().why
    yield
    _gpu_kernels.cache_clear()


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


CASES = {
    # bfloat16 where that is all they can; FlexAttention adds 1 to each hidden unit and takes it off again
    "grouped": (grouped, "swiglu", torch.bfloat16, 1e-2),
    "loop": (loop, "swiglu", torch.float32, 1e-5),
    "flex": (flex, "gelu", torch.float32, 1e-4),
    "liger": (liger, "swiglu", torch.float32, 1e-3),
}


def check(rival, activation, made, index, d_out, bound, forward_only=False):
    """Output and every gradient against the reference in float64."""
    given = [t.detach() if forward_only else t for t in made]
    out = rival(given[0], given[1], index, *given[2:], activation)
    grads = () if forward_only else torch.autograd.grad(out, made, d_out.to(out.dtype))
    wide = [t.detach().double().requires_grad_() for t in made]
    args = (wide[0].flatten(0, 1), wide[1].flatten(0, 1), index, *wide[2:], activation)
    expected = experts_reference(*args).view(d_out.shape)
    expected_grads = torch.autograd.grad(expected, wide, d_out.to(out.dtype).double())
    for got, want in zip((out, *grads), (expected, *expected_grads), strict=not forward_only):
        assert_close(got, want, bound)
    assert [g.dtype for g in grads] == [t.dtype for t in given[: len(grads)]]


@pytest.mark.parametrize("name", CASES)
def test_a_rival_equals_the_reference(name, monkeypatch):
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")  # read at import; tuning needs a GPU
    if name == "liger" and not importlib.util.find_spec("liger_kernel"):
        pytest.skip("liger-kernel is not installed")
    rival, activation, dtype, bound = CASES[name]
    made, index, d_out = inputs(24, 2, 3, 2, 32, 128, activation, dtype)
    # torch has no backward of it on CPUs
    check(rival, activation, made, index, d_out, bound, forward_only=name == "flex")


def test_grouped_mm_in_pieces_of_heads(monkeypatch):
    """No call has more groups than CUDA takes, and the pieces make the same result."""
    monkeypatch.setattr(gpu_rivals, "MAX_GROUPS", 7)
    calls, real = [], torch.nn.functional.grouped_mm

    def counted(a, b, *, offs):
        calls.append(len(offs))
        return real(a, b, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    made, index, d_out = inputs(24, 5, 3, 2, 32, 64, "relu2", torch.float32)
    check(grouped, "relu2", made, index, d_out, 1e-5)
    assert calls == [6, 6, 6, 6, 3, 3]
    monkeypatch.setattr(gpu_rivals, "MAX_GROUPS", 2)
    with pytest.raises(ValueError, match="2 groups, and one head has 3 experts"):
        grouped(made[0], made[1], index, *made[2:], "relu2")


def test_bfloat16_weights_are_taken_as_they_are():
    made, index, d_out = inputs(24, 2, 3, 2, 32, 64, "swiglu", torch.bfloat16)
    made[2:] = [t.detach().bfloat16().requires_grad_() for t in made[2:]]
    for rival in (grouped, scattermoe):
        check(rival, "swiglu", made, index, d_out, 1e-2)


@pytest.mark.parametrize(
    ("activation", "sizes"),
    [
        ("swiglu", (24, 2, 3, 2, 32, 64)),
        ("gelu", (90, 1, 2, 2, 48, 40)),  # more than one block, widths that no tile divides
        ("relu2", (150, 1, 2, 1, 144, 24)),  # more than one tile across and along
    ],
)
def test_scattermoe_equals_the_reference(activation, sizes):
    made, index, d_out = inputs(*sizes, activation, torch.float32)
    check(scattermoe, activation, made, index, d_out, 1e-5)


def test_another_shape_forgets_the_compiled_programs(monkeypatch):
    """So many shapes never reach the limit from which on PyTorch runs eagerly."""
    compiled = []

    def backend(graph, examples):
        compiled.append([tuple(e.shape) for e in examples])
        return graph.forward

    program = torch.compile(lambda x: x.sin() + x.cos(), dynamic=False, backend=backend)
    monkeypatch.setattr(gpu_rivals, "_program", lambda function: program)
    for n in range(2, 22):
        for _ in range(2):
            gpu_rivals._compiled(torch.sin, n)(torch.ones(n))
    assert compiled == [[(n,)] for n in range(2, 22)]
    with pytest.raises(FailOnRecompileLimitHit):
        for n in range(2, 22):
            gpu_rivals._compiled(torch.sin, "one case")(torch.ones(n))
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = False


def test_rivals_are_offered_where_they_can_run():
    assert {"grouped_mm", "ScatterMoE"} <= set(rivals("relu2", 8192, 192))
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


def test_a_router_refuses_what_its_kernel_does_not_take():
    from bench.gpu_rival_routers import route_ieee

    for L, k, message in ((512, 2, "up to 256, not 512"), (64, 3, "not 64 and 3")):
        with pytest.raises(ValueError, match=message):
            route_ieee(torch.ones(4, 1, L), torch.ones(1, 8, L), k)


PROGRAM = """
import dataclasses, json, torch
from bench import gpu_scattermoe as s
from bench.dry_launch import dry_launches
from bench.gpu_rival_routers import route_ieee


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


with dry_launches(90) as found:
    for L, E, k in ((128, 64, 2), (256, 256, 4)):
        route_ieee(empty(4096, 2, L), empty(2, E, L, dtype=torch.float32), k)
    L, F = 64, 256
    order = s.sort_blocks(empty(4096, 2, 2, dtype=torch.int64), 256)
    hid, w_in, w_out = empty(16384, F), empty(512, 2 * F, L), empty(512, F, L)
    pre = s.scatter2scatter(empty(8192, L), w_in.transpose(1, 2), order, 2, False, True)
    y = s.scatter2scatter(hid, w_out, order, 1, True, False)
    d = s.group_rows(y[:8192], empty(16384, dtype=torch.float32), order, 2)
    s.scatter2scatter(d, w_out.transpose(1, 2), order, 1, True, True)
    s.scatter2scatter(pre, w_in, order, 1, True, False)
    s.group_outer(pre, d, order)
print(json.dumps([dataclasses.asdict(kernel) for kernel in found]))
"""


def test_rivals_need_no_stack_on_hopper():
    """A rival that the compiler crippled is no rival."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=environment | {"HEADWAY_TRITON": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout.splitlines()[-1])
    assert len(kernels) == 2 + 6
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["shared"] <= 113 * 1024, kernel
    multiply = [k for k in kernels if k["name"] in ("_scatter2scatter", "_group_outer")]
    assert len(multiply) == 5 and {k["tensor_core"] for k in multiply} == {"wgmma"}
