"""Experts on the GPU: which kernels run each way. Equations and arguments are in ../experts.py.

Narrow experts keep the hidden units of a block of rows on the chip (experts_narrow.py), wide ones
put them in memory (experts_wide.py). On an H100 backward changes over at half the width of forward:
the narrow kernels make the pre-activations twice there.
"""

from torch import Tensor

from headway.kernels.experts import narrow
from headway.kernels.gpu import experts_narrow, experts_wide, on

WIDEST_BACKWARD = 128
"""L up to which the narrow kernels are the faster ones in backward."""


def forward(
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    activation: str,
    keep: bool,
    precision: str = "bfloat16",
) -> tuple[Tensor, Tensor]:
    """(out `[N, L]`, pre-activations `[R, G·F]` of wide experts if `keep`, else `[0, G·F]`)."""
    L, F = x_NL.shape[1], w_out_HEFL.shape[2]
    inputs = (x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE, activation)
    with on(x_NL):
        if narrow(x_NL.dtype, L, F):
            return experts_narrow.forward(*inputs, precision)
        return experts_wide.forward(*inputs, keep)


def backward(
    do_NL: Tensor,
    x_NL: Tensor,
    gate_NK: Tensor,
    w_in_HEGFL: Tensor,
    w_out_HEFL: Tensor,
    slot_R: Tensor,
    row_NK: Tensor,
    counts_HE: Tensor,
    pre_R: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, w_in and w_out. The rows of `pre_R` tell what was kept; `keep` is for
    the other paths."""
    L, F = x_NL.shape[1], w_out_HEFL.shape[2]
    inputs = (do_NL, x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE)
    with on(x_NL):
        if narrow(x_NL.dtype, L, F) and L <= WIDEST_BACKWARD:
            return experts_narrow.backward(*inputs, activation)
        return experts_wide.backward(*inputs, pre_R, activation)
