"""Experts in float8 (e4m3) in the forward pass, against float64; backward is that of bfloat16."""

import pytest
import torch

from headway.config import UsageError
from headway.kernels.experts import experts
from headway.kernels.gpu import GpuKernels
from headway.kernels.paths import GPU_ACTIVATIONS, WIDEST, check_float8
from tests.compare import relative_error
from tests.kernels.gpu.test_experts_gpu import BF16, F32, draw, run, tables
from tests.kernels.test_experts import reference


def float8(inputs, index, activation):
    x, gate, w_in, w_out = (t.detach() for t in inputs)
    rows = tables(index, w_in.shape[1])
    return experts(x, gate, rows, w_in, w_out, activation, precision="float8")


@pytest.mark.parametrize("activation", GPU_ACTIVATIONS)
@pytest.mark.parametrize(("L", "F", "scale"), [(32, 32, 0.3), (48, 80, 1.0), (128, 32, 3.0)])
def test_float8_within_its_bound(device, activation, L, F, scale):
    """Operands rounded to 4 significant bits, 2.5e-2 rms each: tokens, W_in (twice in SwiGLU), hidden, W_out."""
    inputs, index, d_out = draw(device, 40, 1, 4, 2, L, F, activation, BF16, scale=scale)
    expected, _ = reference(inputs, index, activation, d_out.double())
    error = relative_error(float8(inputs, index, activation), expected)
    assert 1e-2 < error < 7e-2
    assert relative_error(run(inputs, index, activation, d_out)[0], expected) < 3e-3


def test_float8_error_does_not_depend_on_the_scale_of_the_inputs(device):
    """ReLU² is homogeneous; powers of two round alike."""
    (x, gate, w_in, w_out), index, _ = draw(device, 24, 1, 4, 2, 32, 32, "relu2", BF16)
    plain = float8((x, gate, w_in, w_out), index, "relu2")
    for factor in (2.0**13, 2.0**-13):
        assert torch.equal(
            float8((x * factor, gate, w_in, w_out), index, "relu2"), plain * factor**2
        )
        assert torch.equal(float8((x, gate, w_in, w_out * factor), index, "relu2"), plain * factor)


@pytest.mark.parametrize("L", [32, 256])
def test_float8_backward_is_that_of_bfloat16(device, L):
    """Of the narrow kernels and, at 256, of the wide ones."""
    inputs, index, d_out = draw(device, 20, 2, 4, 2, L, 32, "swiglu", BF16)
    out = experts(inputs[0], inputs[1], tables(index, 4), *inputs[2:], "swiglu", precision="float8")
    for a, b in zip(
        torch.autograd.grad(out, inputs, d_out), run(inputs, index, "swiglu", d_out)[1], strict=True
    ):
        assert torch.equal(a, b)


def test_float8_zeros_empty_experts_and_nan(device):
    inputs, index, _ = draw(device, 9, 1, 4, 2, 48, 16, "swiglu", BF16)
    index[..., 0], index[..., 1] = (
        2,
        4,
    )  # one expert has all rows, three none; the second slot has no expert
    x = inputs[0].detach().clone()
    x[3], x[5, 1], x[7, 0] = 0, torch.nan, torch.inf
    out = float8((x, *inputs[1:]), index, "swiglu")
    assert (out[3] == 0).all() and not out[[5, 7]].isfinite().any()
    assert out[[0, 1, 2, 4, 6, 8]].isfinite().all() and (out[0] != 0).any()
    assert (
        float8((x, inputs[1], inputs[2] * 0, inputs[3] * 0), index, "swiglu")[[0, 1, 2]] == 0
    ).all()


def test_float8_says_where_it_cannot_run(device):
    inputs, index, _ = draw(device, 4, 1, 3, 2, 32, 16, "swiglu", F32)
    with pytest.raises(UsageError, match="tokens are torch.float32"):
        float8(inputs, index, "swiglu")
    with pytest.raises(UsageError, match="no activation swiglu_clamped"):
        check_float8("cpu", torch.bfloat16, 32, 32, "swiglu_clamped")
    with pytest.raises(UsageError, match="needs the fused kernels"):
        check_float8(device.type, torch.float16, 64, 64)
    for L, F in ((WIDEST[BF16] + 16, 64), (64, 24)):
        with pytest.raises(UsageError, match=f"up to 256, .* not {L} and {F}; use bfloat16"):
            check_float8(device.type, BF16, L, F)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("R", "C"), [(3, 16), (70, 48), (33, 300)])
@pytest.mark.parametrize("transposed", [False, True])
def test_quantised_weights_are_the_nearest_e4m3_numbers(device, dtype, R, C, transposed):
    """Bit for bit those of PyTorch's operators, whatever the strides; zeros and subnormals too."""
    from headway.kernels.gpu.experts_float8 import quantize

    g = torch.Generator().manual_seed(R)
    w = torch.randn(2, C, R, generator=g) * torch.logspace(-6, 3, R)  # a scale of each row
    w[0, :, 0], w[1, : C // 2] = 0, w[1, : C // 2] * 2.0**-14
    w = w.to(dtype).transpose(1, 2)
    w = w if transposed else w.contiguous()
    # on the CPU: CUDA divides by a number of Python as a product with its reciprocal
    scale = w.abs().amax(2, keepdim=True).float() / 448
    scale = torch.where(scale > 0, scale, 1.0)
    expected = (w / scale).to(torch.float8_e4m3fn).contiguous()
    q, measured = quantize(w.to(device))
    assert q.is_contiguous() and torch.equal(measured.cpu(), scale.squeeze(2))
    assert torch.equal(q.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_float8_needs_hopper(monkeypatch):
    monkeypatch.setattr("headway.kernels.paths.gpu_kernels", lambda: GpuKernels("cuda", "a test"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(UsageError, match=r"needs compute capability 9.0, not 8.9; use bfloat16"):
        check_float8("cuda", BF16, 64, 64)
