"""The kernels of wide experts against the plain loops in float64: output and every gradient, with the
pre-activations kept and made again."""

import pytest
import torch

from headway.kernels.experts import experts
from headway.kernels.gpu import experts_wide
from headway.kernels.paths import ExpertInputs, choose_path, fits_on_chip
from tests.compare import relative_error
from tests.kernels.gpu.test_experts_gpu import BF16, F32, compare, draw, run, tables


def call(inputs, index, activation, d_out, keep):
    """Output and gradients, whatever path `choose_path` would take."""
    plain = [t.detach() for t in inputs]
    given = ExpertInputs(*plain, *tables(index, plain[2].shape[1]), activation)
    out, pre = experts_wide.forward(given, keep)
    assert pre.shape[0] == (index.numel() if keep else 0)
    return out, experts_wide.backward(d_out.contiguous(), given, pre)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("T", "H", "E", "K", "L", "F", "activation", "dtype"),
    [
        (40, 2, 4, 2, 32, 16, "swiglu", BF16),
        (40, 1, 3, 2, 320, 48, "gelu", BF16),
        (20, 1, 3, 2, 144, 80, "swiglu", F32),
        (150, 1, 3, 1, 32, 144, "relu2", F32),
        (24, 1, 2, 1, 40, 200, "swiglu", BF16),  # neither a multiple of a tile nor of 16
    ],
)
def test_equals_float64(device, T, H, E, K, L, F, activation, dtype, keep):
    inputs, index, d_out = draw(device, T, H, E, K, L, F, activation, dtype)
    compare(inputs, index, activation, d_out, call(inputs, index, activation, d_out, keep))


@pytest.mark.parametrize("keep", [False, True])
def test_slots_without_an_expert_and_experts_without_a_row(device, keep):
    inputs, index, d_out = draw(device, 18, 2, 5, 3, 48, 24, "swiglu", BF16)
    index[::2, :, 1] = 5
    index[3] = 5
    index[index == 2] = 3
    out, grads = call(inputs, index, "swiglu", d_out, keep)
    compare(inputs, index, "swiglu", d_out, (out, grads))
    assert (out.view(18, 2, 48)[3] == 0).all() and (grads[1].view(18, 2, 3)[3] == 0).all()
    assert (grads[2][:, 2] == 0).all() and (grads[3][:, 2] == 0).all()


def test_equals_the_narrow_kernels(device):
    """The same roundings at the same places: only the order of sums differs."""
    inputs, index, d_out = draw(device, 60, 2, 4, 3, 64, 48, "swiglu", BF16)
    out, grads = run(inputs, index, "swiglu", d_out)
    wide_out, wide_grads = call(inputs, index, "swiglu", d_out, False)
    for a, b in zip((out, *grads), (wide_out, *wide_grads), strict=True):
        assert relative_error(b, a) < 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_is_the_path_of_wide_experts(device, recompute):
    """Through the operator, and what it keeps: pre-activations only where they are asked for."""
    assert choose_path(device.type, BF16, 528, 64) == "fused" and not fits_on_chip(BF16, 528, 64)
    assert not fits_on_chip(F32, 144, 64) and not fits_on_chip(BF16, 64, 40)
    assert fits_on_chip(BF16, 256, 16)
    inputs, index, d_out = draw(device, 30, 1, 3, 2, 544, 16, "swiglu", BF16)
    rows, kept = tables(index, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = experts(inputs[0], inputs[1], rows, *inputs[2:], "swiglu", recompute=recompute)
    assert (torch.Size([60, 32]) in kept) != recompute
    grads = torch.autograd.grad(out, inputs, d_out)
    compare(inputs, index, "swiglu", d_out, (out, grads))


def test_zero_tokens(device):
    inputs, index, d_out = draw(device, 0, 2, 4, 3, 32, 16, "swiglu", BF16)
    out, grads = call(inputs, index, "swiglu", d_out, False)
    assert out.shape == (0, 32) and (grads[2] == 0).all() and (grads[3] == 0).all()


def test_nan_reaches_its_token_and_no_other(device):
    inputs, index, d_out = draw(device, 8, 1, 3, 2, 48, 40, "swiglu", BF16)
    x, gate, w_in, w_out = (t.detach() for t in inputs)
    x[2, 1] = torch.nan
    others = [0, 1, 3, 4, 5, 6, 7]
    out, grads = call((x, gate, w_in, w_out), index, "swiglu", d_out, False)
    assert out[2].isnan().all() and out[others].isfinite().all()
    assert grads[0][others].isfinite().all()
