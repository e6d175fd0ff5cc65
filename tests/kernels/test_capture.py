import pytest
import torch

from headway.kernels.capture import CannotCapture, Capture, capturing
from headway.kernels.cpp import cpp_kernels, undispatched
from headway.kernels.norm import rms_norm
from headway.kernels.packed import pack, packed_linear, packed_rows
from headway.kernels.route import route_logits

native = pytest.mark.skipif(not cpp_kernels().dtypes, reason="no C++ kernels here")


@native
@torch.no_grad()
def test_a_replay_is_the_function_of_what_its_inputs_hold_now():
    torch.manual_seed(0)
    x, index = torch.randn(3, 8), torch.tensor([0, 5, 2])
    weight, norm = pack(torch.randn(12, 8), torch.float32), torch.rand(8)
    logit_bias = torch.randn(1, 12)

    def function() -> tuple[torch.Tensor, ...]:
        y = packed_linear(rms_norm(x, norm, 1e-6), weight) + x[:, :1]
        routed = route_logits(y.unsqueeze(1), logit_bias, None, 2, "sigmoid", True, 1.0)
        z = torch.cat((routed.gate_THK[:, 0], y.to(torch.bfloat16).float()), -1)
        total = z.new_zeros(3)
        total += z.sum(-1).sigmoid()
        return (
            y,
            routed.index_THK,
            routed.counts_HE,
            z,
            total,
            *y.max(-1),
            packed_rows(weight, index),
        )

    with Capture() as capture:
        captured = function()
        assert capturing() is capture and undispatched(x)
    assert capturing() is None
    for _ in range(2):
        x.copy_(torch.randn(3, 8))
        index.copy_(torch.randint(12, (3,)))
        expected = function()
        capture.replay()
        assert all(a.equal(b) for a, b in zip(captured, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "reads", [lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x.nonzero()]
)
def test_what_reads_a_value_is_not_captured(reads):
    with pytest.raises(CannotCapture), Capture():
        reads(torch.randn(3) + 1)


@native
@torch.no_grad()
def test_a_row_that_is_none_is_an_error_or_not_a_number():
    weight, index = pack(torch.randn(12, 8), torch.float32), torch.tensor([3])
    with Capture() as capture:
        row = packed_rows(weight, index)
    with pytest.raises(IndexError):
        packed_rows(weight, torch.tensor([12]))
    for outside in (12, -1):
        index.fill_(outside)
        capture.replay()
        assert row.isnan().all()
