"""Experts as grouped matmuls, on the CPU: output and every gradient, both forms of backward."""

import pytest
import torch

from headway.kernels import experts as module
from headway.kernels import experts_grouped
from headway.kernels.gpu import GpuKernels
from headway.kernels.paths import choose_path, explain
from tests.compare import relative_error
from tests.kernels.test_experts import ACTIVATIONS, make, reference, run


@pytest.fixture(autouse=True)
def grouped(monkeypatch):
    monkeypatch.setattr(module, "path_of", lambda inputs: "grouped")


def draw(T, H, E, K, L, F, activation, scale=1.0):
    """bfloat16 tokens, float32 weights that hold bfloat16 values."""
    inputs, index, d_out = make(T, H, E, K, L, F, activation, torch.bfloat16, scale=scale)
    wide = (t.detach().float().requires_grad_() for t in inputs[1:])
    return (inputs[0], *wide), index, d_out.bfloat16().double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("recompute", [False, True])
def test_within_the_bound_of_two_rounded_products(activation, scale, recompute):
    inputs, index, d_out = draw(40, 2, 4, 2, 24, 16, activation, scale)
    out, grads = run(inputs, index, activation, d_out, recompute)
    expected, expected_grads = reference(inputs, index, activation, d_out)
    assert out.dtype == torch.bfloat16 and grads[2].dtype == torch.float32
    assert relative_error(out, expected) < 5e-3
    for got, want in zip(grads, expected_grads, strict=True):
        assert relative_error(got, want) < 5e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_rows_of_no_expert_are_harmless(monkeypatch, recompute):
    """What `grouped_mm` leaves unwritten is made NaN, the worst that memory can hold."""
    plain = torch.nn.functional.grouped_mm

    def poisoned(a, b, *, offs):
        out = plain(a, b, offs=offs)
        if b.ndim == 3:
            out[int(offs[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(experts_grouped.F, "grouped_mm", poisoned)
    inputs, index, d_out = draw(18, 2, 4, 3, 16, 8, "swiglu")
    index[::2, :, 1] = 4
    index[3] = 4
    out, grads = run(inputs, index, "swiglu", d_out, recompute)
    expected, expected_grads = reference(inputs, index, "swiglu", d_out)
    assert relative_error(out, expected) < 5e-3 and (out.view(18, 2, 16)[3] == 0).all()
    for got, want in zip(grads, expected_grads, strict=True):
        assert relative_error(got, want) < 5e-3


def test_empty_experts_get_zero_gradients():
    inputs, _, d_out = draw(9, 1, 4, 1, 16, 8, "gelu")
    _, grads = run(inputs, torch.full((9, 1, 1), 2), "gelu", d_out)
    empty = [0, 1, 3]
    assert (grads[2][:, empty] == 0).all() and (grads[3][:, empty] == 0).all()
    assert (grads[2][:, 2] != 0).any()


def test_recompute_keeps_nothing_wide_and_gives_the_same_bits():
    inputs, index, d_out = draw(50, 1, 4, 2, 16, 64, "swiglu")
    kept, results = {}, {}
    for recompute in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t
        ):
            results[recompute] = run(inputs, index, "swiglu", d_out, recompute)
        kept[recompute] = max(n for n in sizes if n not in (inputs[2].numel(), inputs[3].numel()))
    assert kept[False] == 50 * 2 * 2 * 64 and kept[True] <= 50 * 16
    for a, b in zip(results[False][1], results[True][1], strict=True):
        assert torch.equal(a, b)


def test_zero_tokens():
    inputs, index, d_out = draw(0, 2, 4, 3, 16, 8, "swiglu")
    out, grads = run(inputs, index, "swiglu", d_out)
    assert out.shape == (0, 16) and (grads[2] == 0).all() and (grads[3] == 0).all()


@pytest.mark.parametrize(
    ("capability", "L", "n_groups", "path"),
    [
        ((9, 0), 528, 8, "grouped"),
        ((10, 0), 4096, 1023, "grouped"),
        ((8, 0), 528, 8, "loop"),
        ((9, 0), 500, 8, "loop"),
        ((9, 0), 1024, 1024, "loop"),
    ],
)
def test_experts_on_a_gpu_without_triton(monkeypatch, capability, L, n_groups, path):
    """`F.grouped_mm` on CUDA refuses 1,024 groups, so a layer of 1,024 experts would fail in its first step."""
    monkeypatch.setattr("headway.kernels.paths.gpu_kernels", lambda: GpuKernels("", "no Triton"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_path("cuda", torch.bfloat16, L, 256, n_groups) == path
    why = explain("cuda", torch.bfloat16, L, 256, n_groups)
    assert "no Triton" in why
    assert ("1024 experts are more than the 1023" in why) == (n_groups == 1024)
    assert choose_path("cuda", torch.float64, L, 256) == "loop"
    assert choose_path("cuda", torch.float16, L, 256) == "loop"
    monkeypatch.setattr("headway.kernels.paths.gpu_kernels", lambda: GpuKernels("cuda", "a test"))
    assert choose_path("cuda", torch.bfloat16, L, 256, n_groups) == "fused"
