"""Routed experts the way of ScatterMoE (arXiv 2403.08245), a rival of the project's kernels.

Two grouped matmuls around elementwise work of PyTorch. Blocks of sorted rows, each of one expert,
read their rows wherever they lie and write them where they belong (`scatter2scatter`), so that
forward copies no rows into sorted order; backward does, for the gradients of the weights
(`group_rows`, `group_outer`). Written from the paper; nothing depends on the data on the host.

R = N·K slots · N sub-tokens · A = H·E groups · L width · C columns of a matmul's output.
"""

# Triton's annotations describe its compiler, not what a kernel writes.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.activation import activate_reference
from headway.kernels.gpu import on
from headway.kernels.gpu.arith import dot, narrow, widen

ROWS = 128
"""Rows of a block, as published."""


class Order(NamedTuple):
    """Where the rows of each group are; int32, made without a host sync."""

    slot_R: Tensor
    """Sorted row → slot, n·K + k."""
    start_A: Tensor
    """`[A + 1]`: first sorted row of each group, and R."""
    group_B: Tensor
    """`[⌈R/128⌉ + A]`: block → group, A past the last block."""
    row_B: Tensor
    """Block → its first sorted row."""


def sort_blocks(index_THK: Tensor, n_experts: int) -> Order:
    """Sort the slots by (head, expert) and cut every group into blocks of `ROWS` rows."""
    H, device = index_THK.shape[1], index_THK.device
    A, R = H * n_experts, index_THK.numel()
    heads = torch.arange(H, device=device, dtype=torch.int32).view(-1, 1) * n_experts
    key_R, slot_R = torch.sort((index_THK.to(torch.int32) + heads).flatten())
    groups = torch.arange(A + 1, device=device, dtype=torch.int32)
    start_A = torch.searchsorted(key_R, groups, out_int32=True)
    n_A = (start_A.diff() + (ROWS - 1)) // ROWS
    end_A = n_A.cumsum(0, dtype=torch.int32)
    block_B = torch.arange(-(-R // ROWS) + A, device=device, dtype=torch.int32)
    group_B = torch.searchsorted(end_A, block_B, right=True, out_int32=True)
    own_B = group_B.clamp(max=A - 1).long()
    row_B = start_A[own_B] + (block_B - (end_A - n_A)[own_B]) * ROWS
    return Order(slot_R.to(torch.int32), start_A, group_B, row_B)


@triton.jit
def _scatter2scatter(
    x,
    w,
    y,
    slots,
    starts,
    groups,
    rows,
    w_group,
    w_in,
    w_out,
    A,
    L: tl.constexpr,
    C: tl.constexpr,
    FAN_OUT: tl.constexpr,
    X_SORTED: tl.constexpr,
    Y_SORTED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
):
    """y[row] = x[row] · w[group] for one block of rows and one of columns; strides of w in
    elements."""
    n_cols: tl.constexpr = (C + BC - 1) // BC
    b = tl.program_id(0) // n_cols
    group = tl.load(groups + b)
    if group >= A:
        return
    row = tl.load(rows + b) + tl.arange(0, BR)
    inside = row < tl.load(starts + group + 1)
    if X_SORTED and Y_SORTED:
        slot = row
    else:
        slot = tl.load(slots + row, mask=inside, other=0)
    x_row = row if X_SORTED else slot // FAN_OUT
    y_row = row if Y_SORTED else slot
    col = tl.program_id(0) % n_cols * BC + tl.arange(0, BC)
    depth = tl.arange(0, BL)
    x_at = x + x_row.to(tl.int64)[:, None] * L + depth[None, :]
    w_at = w + group.to(tl.int64) * w_group + depth[:, None] * w_in + col[None, :] * w_out
    acc = tl.zeros((BR, BC), tl.float32)
    for first in range(0, L, BL):
        if L % BL == 0:
            x_RL = tl.load(x_at, mask=inside[:, None], other=0.0)
            if C % BC == 0:
                w_LC = tl.load(w_at)
            else:
                w_LC = tl.load(w_at, mask=col[None, :] < C, other=0.0)
        else:
            left = depth < L - first
            x_RL = tl.load(x_at, mask=inside[:, None] & left[None, :], other=0.0)
            w_LC = tl.load(w_at, mask=left[:, None] & (col[None, :] < C), other=0.0)
        acc = dot(x_RL, w_LC, acc)
        x_at += BL
        w_at += BL * w_in
    y_at = y + y_row.to(tl.int64)[:, None] * C + col[None, :]
    tl.store(y_at, narrow(acc, y.dtype.element_ty), mask=inside[:, None] & (col[None, :] < C))


@triton.jit
def _group_outer(
    a,
    b,
    out,
    starts,
    M: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """out[group] = aᵀ·b over the rows of the group, both in sorted order; zeros without rows."""
    n_rows: tl.constexpr = (M + BM - 1) // BM
    n_cols: tl.constexpr = (C + BC - 1) // BC
    group = tl.program_id(0) // (n_rows * n_cols)
    tile = tl.program_id(0) % (n_rows * n_cols)
    m = tile // n_cols * BM + tl.arange(0, BM)
    c = tile % n_cols * BC + tl.arange(0, BC)
    begin = tl.load(starts + group)
    end = tl.load(starts + group + 1)
    acc = tl.zeros((BM, BC), tl.float32)
    for first in range(begin, end, BR):
        row = first + tl.arange(0, BR)
        wide = row.to(tl.int64)
        inside = row < end
        a_MR = tl.load(
            a + wide[None, :] * M + m[:, None], mask=inside[None, :] & (m[:, None] < M), other=0.0
        )
        b_RC = tl.load(
            b + wide[:, None] * C + c[None, :], mask=inside[:, None] & (c[None, :] < C), other=0.0
        )
        acc = dot(a_MR, b_RC, acc)
    out_at = out + group.to(tl.int64) * M * C + m[:, None] * C + c[None, :]
    inside = (m[:, None] < M) & (c[None, :] < C)
    tl.store(out_at, narrow(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def _group_rows(
    x,
    gates,
    y,
    slots,
    R,
    L: tl.constexpr,
    FAN_OUT: tl.constexpr,
    GATED: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
):
    """y = rows of x in sorted order, times their gates."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < R
    slot = tl.load(slots + row, mask=inside, other=0)
    x_row = (slot // FAN_OUT).to(tl.int64)
    for first in range(0, L, BL):
        col = first + tl.arange(0, BL)
        mask = inside[:, None] & (col[None, :] < L)
        value = tl.load(x + x_row[:, None] * L + col[None, :], mask=mask, other=0.0)
        if GATED:
            gate = tl.load(gates + slot, mask=inside, other=0.0).to(tl.float32)
            value = narrow(widen(value) * gate[:, None], y.dtype.element_ty)
        tl.store(y + row[:, None] * L + col[None, :], value, mask=mask)


def _tile(width: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(width)))


def scatter2scatter(
    x_NL: Tensor, w_ALC: Tensor, order: Order, fan_out: int, x_sorted: bool, y_sorted: bool
) -> Tensor:
    """`[R, C]`: x·w of every slot's group, x and the result in the order of slots or sorted; slot s
    reads row s // fan_out of an x that is not sorted. w_ALC may be a transposed view."""
    R, L, (A, _, C) = len(order.slot_R), x_NL.shape[1], w_ALC.shape
    x_NL = x_NL.contiguous()
    y_RC = x_NL.new_empty(R, C)
    cols, depth = _tile(C, 128), _tile(L, 64 if x_NL.element_size() == 2 else 32)
    grid = (len(order.group_B) * triton.cdiv(C, cols),)
    strides = w_ALC.stride()
    with on(x_NL):
        _scatter2scatter[grid](
            *(x_NL, w_ALC, y_RC, order.slot_R, order.start_A, order.group_B, order.row_B),
            *(*strides, A, L, C, fan_out, x_sorted, y_sorted, ROWS, cols, depth),
            num_warps=8 if cols > 64 else 4,
            num_stages=3,
        )
    return y_RC


def group_outer(a_RM: Tensor, b_RC: Tensor, order: Order) -> Tensor:
    """`[A, M, C]`: aᵀ·b of every group, rows in sorted order."""
    a_RM, b_RC = a_RM.contiguous(), b_RC.contiguous()
    (M, C), A = (a_RM.shape[1], b_RC.shape[1]), len(order.start_A) - 1
    out_AMC = a_RM.new_empty(A, M, C)
    rows, cols = _tile(M, 128), _tile(C, 128)
    grid = (A * triton.cdiv(M, rows) * triton.cdiv(C, cols),)
    depth = 64 if a_RM.element_size() == 2 else 32
    with on(a_RM):
        _group_outer[grid](
            *(a_RM, b_RC, out_AMC, order.start_A, M, C, depth, rows, cols),
            num_warps=8 if rows * cols > 64 * 128 else 4,
            num_stages=3,
        )
    return out_AMC


def group_rows(x_NL: Tensor, gate_R: Tensor | None, order: Order, fan_out: int) -> Tensor:
    """`[R, L]`: row slot // fan_out of x for every sorted row, times the gate of its slot."""
    R, L = len(order.slot_R), x_NL.shape[1]
    x_NL = x_NL.contiguous()
    y_RL, gated = x_NL.new_empty(R, L), gate_R is not None
    with on(x_NL):
        _group_rows[(triton.cdiv(R, 32),)](
            *(x_NL, gate_R if gated else x_NL, y_RL, order.slot_R, R),
            *(L, fan_out, gated, 32, _tile(L, 128)),
            num_warps=4,
        )
    return y_RL


class _First(torch.autograd.Function):
    """x_NL by slots, w_ACL → pre-activations `[R, C]`, sorted."""

    @staticmethod
    def forward(ctx, x_NL: Tensor, w_ACL: Tensor, order: Order, k: int) -> Tensor:
        ctx.save_for_backward(x_NL, w_ACL)
        ctx.order, ctx.k = order, k
        return scatter2scatter(x_NL, w_ACL.transpose(1, 2), order, k, False, True)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x_NL, w_ACL = ctx.saved_tensors
        d_w = group_outer(grads[0], group_rows(x_NL, None, ctx.order, ctx.k), ctx.order)
        d_x_RL = scatter2scatter(grads[0], w_ACL, ctx.order, 1, True, False)
        return d_x_RL.view(len(x_NL), ctx.k, -1).sum(1), d_w, None, None


class _Second(torch.autograd.Function):
    """Hidden units `[R, F]`, sorted; w_AFL; gates → y_NL, the gated sum over slots."""

    @staticmethod
    def forward(ctx, hid_RF: Tensor, w_AFL: Tensor, gate_NK: Tensor, order: Order) -> Tensor:
        N, K = gate_NK.shape
        y_NKL = scatter2scatter(hid_RF, w_AFL, order, 1, True, False).view(N, K, -1)
        ctx.save_for_backward(hid_RF, w_AFL, gate_NK, y_NKL)
        ctx.order = order
        return (y_NKL * gate_NK.to(y_NKL.dtype)[..., None]).sum(1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (hid_RF, w_AFL, gate_NK, y_NKL), order = ctx.saved_tensors, ctx.order
        d_gate = (y_NKL * grads[0][:, None]).sum(-1, dtype=torch.float32).to(gate_NK.dtype)
        d_RL = group_rows(grads[0], gate_NK.contiguous(), order, gate_NK.shape[1])
        d_hid = scatter2scatter(d_RL, w_AFL.transpose(1, 2), order, 1, True, True)
        return d_hid, group_outer(hid_RF, d_RL, order), d_gate, None


def scattermoe(x_THL, gate_THK, index_THK, w_in_HEGFL, w_out_HEFL, activation: str) -> Tensor:
    """Two scattered grouped matmuls, activation and gates in PyTorch; a rival of
    bench/gpu_rivals.py, with its arguments."""
    (T, H, L), E, K = x_THL.shape, w_in_HEGFL.shape[1], index_THK.shape[-1]
    order = sort_blocks(index_THK, E)
    w_in = w_in_HEGFL.to(x_THL.dtype).reshape(H * E, -1, L)
    w_out = w_out_HEFL.to(x_THL.dtype).reshape(H * E, -1, L)
    pre = _First.apply(x_THL.reshape(T * H, L), w_in, order, K)
    hid_RF = activate_reference(pre, activation)
    return _Second.apply(hid_RF, w_out, gate_THK.reshape(T * H, K), order).view(T, H, L)
