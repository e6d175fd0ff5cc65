"""Experts on the GPU: which kernels run each way. Equations and arguments are in ../experts.py.

Narrow experts keep the hidden units of a block of rows on the chip (experts_narrow.py), wide ones
put them in memory (experts_wide.py). On an H100 backward changes over at half the width of forward:
the narrow kernels make the pre-activations twice there."""

from torch import Tensor

from headway.config import Precision
from headway.kernels.gpu import experts_narrow, experts_wide, on
from headway.kernels.paths import ExpertInputs, fits_on_chip

WIDEST_BACKWARD = 128
"""L up to which the narrow kernels are the faster ones in backward."""


def forward(
    inputs: ExpertInputs, keep: bool, precision: Precision = "bfloat16"
) -> tuple[Tensor, Tensor]:
    """Return (out `[N, L]`, pre-activations `[R, G·F]` of wide experts if `keep`, else empty)."""
    x_NL, (F, L) = inputs.x_NL, inputs.w_out_HEFL.shape[2:]
    with on(x_NL):
        if fits_on_chip(x_NL.dtype, L, F):
            return experts_narrow.forward(inputs, precision)
        return experts_wide.forward(inputs, keep)


def backward(
    do_NL: Tensor, inputs: ExpertInputs, pre_R: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gates, w_in and w_out; `pre_R` has rows if kept."""
    x_NL, (F, L) = inputs.x_NL, inputs.w_out_HEFL.shape[2:]
    with on(x_NL):
        if fits_on_chip(x_NL.dtype, L, F) and L <= WIDEST_BACKWARD:
            return experts_narrow.backward(do_NL, inputs)
        return experts_wide.backward(do_NL, inputs, pre_R)
