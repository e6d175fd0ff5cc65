"""RMSNorm, alone and before a rotation, in Triton, against float64."""

import pytest
import torch

from headway.kernels.norm import norm_rope, rms_norm, rms_norm_reference
from headway.kernels.rope import rope_reference, rope_tables
from tests.compare import assert_close

BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-3}
F32, BF16 = torch.float32, torch.bfloat16


def draw(device, shape, weight_shape, dtype):
    g = torch.Generator().manual_seed(0)
    x, d_out = (torch.randn(shape, generator=g).to(dtype).to(device) for _ in range(2))
    weight = (1 + torch.randn(weight_shape, generator=g)).to(device)
    return x.requires_grad_(), weight.requires_grad_(), d_out


def run(function, x, weight, d_out, wide=False):
    if wide:
        x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    out = function(x, weight)
    return out, *torch.autograd.grad(out, (x, weight), d_out.to(out.dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("shape", "weight_shape"),
    [
        ((70, 96), (96,)),
        ((3, 5, 33), (33,)),
        ((2, 5000), (5000,)),
        ((9, 3, 64), (3, 64)),
        ((300, 3), (3,)),
    ],
)
def test_both_passes_equal_float64(device, shape, weight_shape, dtype):
    x, weight, d_out = draw(device, shape, weight_shape, dtype)
    got = run(lambda x, w: rms_norm(x, w, 1e-6), x, weight, d_out)
    want = run(lambda x, w: rms_norm_reference(x, w, 1e-6), x, weight, d_out, True)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == F32
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, BOUND[a.dtype])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("B", "S", "H", "d"), [(2, 7, 3, 32), (1, 40, 2, 6), (3, 1, 1, 64)])
def test_a_rotated_norm_equals_float64(device, B, S, H, d, dtype):
    x, weight, d_out = draw(device, (B, S, H, d), (d,), dtype)
    tables = rope_tables(torch.arange(S, device=device), d, 1e4, dtype)

    def reference(x, weight):
        wide = (t.double() for t in tables)
        return rope_reference(rms_norm_reference(x, weight, 1e-6), *wide)

    got = run(lambda x, w: norm_rope(x, w, 1e-6, *tables), x, weight, d_out)
    for a, b in zip(got, run(reference, x, weight, d_out, True), strict=True):
        assert_close(a, b, BOUND[a.dtype])


def test_the_kernels_run_where_they_say(device, monkeypatch):
    """A wider row, and what has no kernel, takes PyTorch's path; the others launch two kernels."""
    from headway.kernels.gpu import norm

    calls = []
    for name in ("forward", "backward"):
        function = getattr(norm, name)
        monkeypatch.setattr(norm, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    for width, expected in ((40, ["forward", "backward"]), (8193, [])):
        x, weight, d_out = draw(device, (2, width), (width,), F32)
        run(lambda x, w: rms_norm(x, w, 1e-6), x, weight, d_out)
        assert calls == (expected if width == 40 else [])
        calls.clear()


def test_many_programs_and_the_same_bits(device, monkeypatch):
    """Weights' gradients are summed over several tiles of each program, in order."""
    from headway.kernels.gpu import norm

    monkeypatch.setattr(norm, "PROGRAMS", 4)
    monkeypatch.setattr(norm, "TILE", 256)
    x, weight, d_out = draw(device, (41, 70), (70,), BF16)
    one, two = (run(lambda x, w: rms_norm(x, w, 1e-6), x, weight, d_out) for _ in range(2))
    want = run(lambda x, w: rms_norm_reference(x, w, 1e-6), x, weight, d_out, True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for a, b in zip(one, want, strict=True):
        assert_close(a, b, BOUND[a.dtype])


def test_no_rows_nan_and_strides(device):
    out, dx, d_weight = run(
        lambda x, w: rms_norm(x, w, 1e-6), *draw(device, (0, 3, 5), (3, 5), F32)
    )
    assert out.shape == dx.shape == (0, 3, 5) and (d_weight == 0).all()
    x, weight, d_out = draw(device, (4, 20), (20,), F32)
    x.data[1, 18], x.data[2, 3] = torch.nan, torch.inf
    out, dx, _ = run(lambda x, w: rms_norm(x, w, 1e-6), x, weight, d_out)
    assert out[1].isnan().all() and out[2, 3].isnan() and dx[1:3].isnan().all()
    assert out[[0, 3]].isfinite().all() and dx[[0, 3]].isfinite().all()
    far = x.detach().T.contiguous().T.requires_grad_()
    again = run(lambda x, w: rms_norm(x, w, 1e-6), far, weight, d_out)[0]
    assert torch.equal(again[[0, 3]], out[[0, 3]])
