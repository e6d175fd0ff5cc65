"""How others compute routed experts on a GPU, written from their published descriptions.

Every rival is a differentiable function of the same arguments and sorts (or packs) its rows by
itself:

    x_THL in the dtype of the matmuls · gate_THK float32 · index_THK · w_in_HEGFL, w_out_HEFL
    float32 masters, or weights in the dtype of the matmuls · activation  →  y_THL

T tokens · H heads · L width · E experts per head · K chosen · F hidden width · G·F pre-activations.
A shape that a rival cannot do raises; whoever measures records that.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from headway.kernels.activation import activate_reference

Rival = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]
MAX_GROUPS = 1023
"""Groups that one F.grouped_mm takes on CUDA."""
ROWS = 4096
"""FlexAttention's rows come in multiples of this: each number of rows is a program of its own."""


def sort_slots(index_THK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Slots in the order of (head, expert), int64; the end of each group, int32. No host sync."""
    H = index_THK.shape[1]
    heads = torch.arange(H, device=index_THK.device, dtype=torch.int32).view(-1, 1)
    key_R, order_R = torch.sort((index_THK.to(torch.int32) + heads * n_experts).flatten())
    groups = torch.arange(H * n_experts, device=key_R.device, dtype=torch.int32)
    return order_R, torch.searchsorted(key_R, groups, right=True, out_int32=True)


class _Gather(torch.autograd.Function):
    """Rows of sub-tokens, in sorted order. Backward sums the K rows of each sub-token, which the
    inverse permutation finds: no atomics."""

    @staticmethod
    def forward(ctx, x_NL: Tensor, source_R: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_NL[source_R]

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (place_NK,) = ctx.saved_tensors
        return grads[0][place_NK].sum(1), None, None


class _Combine(torch.autograd.Function):
    """Σ gate·y over the K rows of each sub-token."""

    @staticmethod
    def forward(ctx, y_RL: Tensor, gate_NK: Tensor, gate_R: Tensor, source_R: Tensor, place_NK):
        ctx.save_for_backward(y_RL, gate_R, source_R, place_NK)
        return (y_RL[place_NK] * gate_NK.to(y_RL.dtype)[..., None]).sum(1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        y_RL, gate_R, source_R, place_NK = ctx.saved_tensors
        d_RL = grads[0][source_R]
        d_gate_R = (d_RL * y_RL).sum(1, dtype=torch.float32)
        return d_RL * gate_R.to(d_RL.dtype)[:, None], d_gate_R[place_NK], None, None, None


def _pieces(H: int, E: int) -> list[int]:
    """Heads of each call of grouped_mm, as even as they can be."""
    if E > MAX_GROUPS:
        raise ValueError(f"grouped_mm takes {MAX_GROUPS} groups, and one head has {E} experts")
    n = -(-H // (MAX_GROUPS // E))
    return [H // n + (i < H % n) for i in range(n)]


def _grouped(x_THL, gate_THK, order_R, ends_G, w_in_HEGFL, w_out_HEFL, activation: str) -> Tensor:
    """`grouped` after the sort. A head has T·K rows, so that the host knows where the rows of a
    piece of whole heads begin and end."""
    (T, H, L), E, K = x_THL.shape, w_in_HEGFL.shape[1], gate_THK.shape[-1]
    sizes = _pieces(H, E)
    w_ins = w_in_HEGFL.to(x_THL.dtype).split(sizes)  # its backward is one concatenation
    w_outs = w_out_HEFL.to(x_THL.dtype).split(sizes)
    xs, gates = x_THL.split(sizes, dim=1), gate_THK.split(sizes, dim=1)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    place_THK = place_R.view(T, H, K)
    ys, done = [], 0
    for n, x, gate, w_in, w_out in zip(sizes, xs, gates, w_ins, w_outs, strict=True):
        first, last = done * T * K, (done + n) * T * K
        order = order_R[first:last]
        place_NK = (place_THK[:, done : done + n] - first).reshape(T * n, K)
        # slots count all heads of a token, the piece only its own
        source = order // (H * K) * n + order // K % H - done
        ends = ends_G[done * E : (done + n) * E] - first
        x_RL = _Gather.apply(x.reshape(T * n, L), source, place_NK)
        pre = F.grouped_mm(x_RL, w_in.flatten(2, 3).flatten(0, 1).transpose(1, 2), offs=ends)
        y_RL = F.grouped_mm(activate_reference(pre, activation), w_out.flatten(0, 1), offs=ends)
        gate_R = gate_THK.detach().flatten()[order]
        y_NL = _Combine.apply(y_RL, gate.reshape(T * n, K), gate_R, source, place_NK)
        ys.append(y_NL.view(T, n, L))
        done += n
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)


def grouped(x_THL, gate_THK, index_THK, w_in_HEGFL, w_out_HEFL, activation: str) -> Tensor:
    """Sort, gather, two grouped matmuls, weighted sum: what most frameworks do.

    Errors: ValueError where one head alone has more groups than F.grouped_mm takes.
    """
    order_R, ends_G = sort_slots(index_THK, w_in_HEGFL.shape[1])
    return _grouped(x_THL, gate_THK, order_R, ends_G, w_in_HEGFL, w_out_HEFL, activation)


_compiled_for: list[tuple] = []
"""The shapes that the compiled rivals were last called with, at most one entry."""


@functools.cache
def _program(function: Callable) -> Callable:
    """One program for every shape would be slower, and time here is each rival's best."""
    return torch.compile(function, dynamic=False)


def _compiled(function: Callable, *case) -> Callable:
    """`function` compiled for this case alone: its programs are forgotten when another case comes,
    so that their number stays below the limit from which on PyTorch runs them eagerly without a
    word; where it does not, that is an error."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if _compiled_for != [case]:
        torch._dynamo.reset()
        _compiled_for[:] = [case]
    return _program(function)


def _case(x_THL: Tensor, index_THK: Tensor, w_in_HEGFL: Tensor, activation: str) -> tuple:
    shapes = (x_THL.shape, index_THK.shape, w_in_HEGFL.shape)
    return *shapes, x_THL.dtype, w_in_HEGFL.dtype, activation


def grouped_compiled(x_THL, gate_THK, index_THK, w_in_HEGFL, w_out_HEFL, activation: str):
    """`grouped` with its elementwise work fused by torch.compile; the sort is not part of it."""
    run = _compiled(_grouped, *_case(x_THL, index_THK, w_in_HEGFL, activation))
    order_R, ends_G = sort_slots(index_THK, w_in_HEGFL.shape[1])
    return run(x_THL, gate_THK, order_R, ends_G, w_in_HEGFL, w_out_HEFL, activation)


def loop(x_THL, gate_THK, index_THK, w_in_HEGFL, w_out_HEFL, activation: str) -> Tensor:
    """One dense matmul after the other, an expert at a time."""
    T, H, L = x_THL.shape
    E, K = w_in_HEGFL.shape[1], index_THK.shape[-1]
    order_R, ends_G = sort_slots(index_THK, E)
    counts_G = torch.diff(ends_G, prepend=ends_G.new_zeros(1))
    x_NL, gate_R = x_THL.reshape(T * H, L), gate_THK.flatten()[order_R, None]
    w_in = w_in_HEGFL.to(x_THL.dtype).flatten(2, 3).flatten(0, 1)
    w_out = w_out_HEFL.to(x_THL.dtype).flatten(0, 1)
    ys = []
    for g, rows in enumerate((order_R // K).split(counts_G.tolist())):
        if len(rows):
            ys.append(activate_reference(x_NL[rows] @ w_in[g].T, activation) @ w_out[g])
    weighted = torch.cat(ys).to(gate_R.dtype) * gate_R
    out = weighted.new_zeros(T * H, L)
    return out.index_add_(0, order_R // K, weighted).to(x_THL.dtype).view(T, H, L)


def flex(x_THL, gate_THK, index_THK, w_in_HEGFL, w_out_HEFL, activation: str) -> Tensor:
    """Experts as block-sparse attention, the way of arXiv 2602.04870: GELU only.

    Rows are queries, hidden units are keys and values, and log1p(gelu(s)) is the score, so that
    softmax gives Σ(1 + gelu)·v / Z. What was added is taken off again: y = O·Z − Σ v. Each group's
    rows are padded to blocks of 128, and F must be a multiple of 128.
    """
    assert activation == "gelu", "the trick is for one activation that stays above -1"
    (T, H, L), (_, E, _, Fh, _) = x_THL.shape, w_in_HEGFL.shape
    K, block = index_THK.shape[-1], 128
    assert Fh % block == 0, f"hidden units come in blocks of {block}, not {Fh}"
    slots = torch.arange(T * K, device=x_THL.device)
    key_HR = index_THK.to(torch.int32).permute(1, 0, 2).reshape(H, T * K)
    sorted_key_HR, order_HR = torch.sort(key_HR, dim=1)
    experts_HE = torch.arange(E, device=x_THL.device, dtype=torch.int32).repeat(H, 1)
    stop_HE = torch.searchsorted(sorted_key_HR, experts_HE, right=True)
    counts_HE = torch.diff(stop_HE, prepend=stop_HE.new_zeros(H, 1))
    padded_HE = (counts_HE + block - 1) // block * block
    n_rows = int(padded_HE.sum(1).max())  # a host sync per layer, as published
    n_rows = -(-n_rows // ROWS) * ROWS
    start_HE, padded_start_HE = (c.cumsum(1) - c for c in (counts_HE, padded_HE))
    shift_HR = (padded_start_HE - start_HE).gather(1, sorted_key_HR.to(torch.int64))
    place_HR = slots + shift_HR
    token_HR = torch.zeros(H, n_rows, dtype=torch.int64, device=x_THL.device)
    token_HR.scatter_(1, place_HR, order_HR // K)

    q_HRL = x_THL.transpose(0, 1).gather(1, token_HR[..., None].expand(-1, -1, L))
    keys, values = (w.to(x_THL.dtype).reshape(H, E * Fh, L) for w in (w_in_HEGFL, w_out_HEFL))
    first_HB = torch.arange(n_rows // block, device=x_THL.device).mul(block).expand(H, -1)
    ends_HE = padded_HE.cumsum(1)
    expert_HB = torch.searchsorted(ends_HE, first_HB.contiguous(), right=True).clamp(max=E - 1)
    run = flex_attention
    if x_THL.is_cuda:
        run = _compiled(flex_attention, *_case(x_THL, index_THK, w_in_HEGFL, activation))
    o_HRL, aux = run(
        q_HRL[None],
        keys[None],
        values[None],
        score_mod=_log1p_gelu,
        block_mask=_mask(expert_HB, Fh // block, E * Fh // block, n_rows, E * Fh, block),
        scale=1.0,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None, "it was asked for"
    total_HEL = w_out_HEFL.sum(2).to(x_THL.dtype)
    total_HRL = total_HEL.gather(1, expert_HB[..., None].expand(-1, -1, L)).repeat_interleave(
        block, dim=1
    )
    y_HRL = o_HRL[0] * aux.lse[0].exp()[..., None].to(o_HRL.dtype) - total_HRL
    back_HR = torch.empty_like(order_HR).scatter_(1, order_HR, place_HR)
    y_HSL = y_HRL.gather(1, back_HR[..., None].expand(-1, -1, L)).view(H, T, K, L)
    weighted = y_HSL.float() * gate_THK.transpose(0, 1)[..., None]
    return weighted.sum(2).to(x_THL.dtype).transpose(0, 1)


def _log1p_gelu(score, b, h, q, kv):
    return torch.log1p(F.gelu(score))


def _mask(expert_HB: Tensor, per_expert: int, n_kv: int, q_len: int, kv_len: int, block: int):
    """Row block b sees the `per_expert` blocks of hidden units of its expert, all of them whole."""
    H, n_q = expert_HB.shape
    device = expert_HB.device
    own = torch.arange(per_expert, device=device, dtype=torch.int32)
    full = torch.zeros(1, H, n_q, n_kv, dtype=torch.int32, device=device)
    full[0, :, :, :per_expert] = expert_HB[..., None].to(torch.int32) * per_expert + own
    width = per_expert * block

    def same_expert(b, h, q, kv):
        """What the tables say, for code that does not read them."""
        return kv // width == expert_HB[h, q // block]

    count = torch.full((1, H, n_q), per_expert, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        torch.zeros_like(full),
        count,
        full,
        BLOCK_SIZE=block,
        mask_mod=same_expert,
        seq_lengths=(q_len, kv_len),
    )


def liger(x_THL, gate_THK, index_THK, w_in_HEGFL, w_out_HEFL, activation: str) -> Tensor:
    """The fused MoE of the package liger-kernel (SwiGLU, one layer of experts): heads become groups
    of experts, and sub-tokens tokens."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    assert activation == "swiglu", "liger-kernel has SwiGLU only"
    (T, H, L), (_, E, _, Fh, _) = x_THL.shape, w_in_HEGFL.shape
    head_H1 = torch.arange(H, device=index_THK.device).view(-1, 1) * E
    w_in = w_in_HEGFL.to(x_THL.dtype).view(H * E, 2 * Fh, L)
    w_out = w_out_HEFL.to(x_THL.dtype).flatten(0, 1).transpose(1, 2).contiguous()
    y_NL = LigerFusedMoEFunction.apply(
        x_THL.reshape(T * H, L),
        w_in,
        w_out,
        (index_THK + head_H1).to(torch.int32).flatten(0, 1),
        gate_THK.flatten(0, 1).to(x_THL.dtype),
    )
    return y_NL.view(T, H, L)


def rivals(activation: str, n_groups: int, d_expert: int) -> dict[str, Rival]:
    """Those that can compute this shape here, by name."""
    found: dict[str, Rival] = {"grouped_mm": grouped, "grouped_mm, compiled": grouped_compiled}
    if n_groups <= 512:  # beyond, launches alone take longer than everything else
        found["dense loop"] = loop
    if importlib.util.find_spec("triton"):
        from bench.gpu_scattermoe import scattermoe

        found["ScatterMoE"] = scattermoe
    if activation == "gelu" and d_expert % 128 == 0:
        found["FlexAttention"] = flex
    if activation == "swiglu" and importlib.util.find_spec("liger_kernel"):
        found["liger-kernel"] = liger
    return found
