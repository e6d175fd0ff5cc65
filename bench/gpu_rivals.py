"""How others compute routed experts on a GPU, written from their published descriptions.

Every rival is a differentiable function of the same arguments and sorts (or packs) its rows by
itself:

    x_THL in the dtype of the matmuls · gate_THK float32 · index_THK · w_in_HEGFL, w_out_HEFL
    float32 masters · activation  →  y_THL

T tokens · H heads · L width · E experts per head · K chosen · F hidden width · G·F pre-activations.
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


def _sorted(index_THK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots in the order of (head, expert); rows of each group; the end of each group (int32)."""
    head_H1 = torch.arange(index_THK.shape[1], device=index_THK.device).view(-1, 1) * n_experts
    key = (index_THK + head_H1).flatten()
    order_R = torch.sort(key, stable=True).indices
    counts_G = torch.zeros(index_THK.shape[1] * n_experts, dtype=torch.int64, device=key.device)
    counts_G.scatter_add_(0, key, torch.ones_like(key))
    return order_R, counts_G, counts_G.cumsum(0).to(torch.int32)


def grouped(x_THL, gate_THK, index_THK, w_in_HEGFL, w_out_HEFL, activation: str) -> Tensor:
    """Sort, gather, two grouped matmuls, weighted scatter: what most frameworks do."""
    T, H, L = x_THL.shape
    E, K = w_in_HEGFL.shape[1], index_THK.shape[-1]
    order_R, _, ends_G = _sorted(index_THK, E)
    x_RL = x_THL.reshape(T * H, L)[order_R // K]
    w_in = w_in_HEGFL.to(x_THL.dtype).flatten(2, 3).flatten(0, 1)
    w_out = w_out_HEFL.to(x_THL.dtype).flatten(0, 1)
    pre = F.grouped_mm(x_RL, w_in.transpose(1, 2), offs=ends_G)
    y_RL = F.grouped_mm(activate_reference(pre, activation), w_out, offs=ends_G)
    weighted = y_RL.float() * gate_THK.flatten()[order_R, None]
    out = torch.zeros(T * H, L, dtype=torch.float32, device=x_THL.device)
    return out.index_add_(0, order_R // K, weighted).to(x_THL.dtype).view(T, H, L)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """One program for every shape would be slower, and time here is each rival's best."""
    return torch.compile(function, dynamic=False)


def grouped_compiled(*args) -> Tensor:
    """`grouped` with its elementwise work fused by torch.compile."""
    return _compiled(grouped)(*args)


def loop(x_THL, gate_THK, index_THK, w_in_HEGFL, w_out_HEFL, activation: str) -> Tensor:
    """One dense matmul after the other, an expert at a time."""
    T, H, L = x_THL.shape
    E, K = w_in_HEGFL.shape[1], index_THK.shape[-1]
    order_R, counts_G, _ = _sorted(index_THK, E)
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
    key_HR = index_THK.permute(1, 0, 2).reshape(H, T * K)
    counts_HE = torch.zeros(H, E, dtype=torch.int64, device=key_HR.device)
    counts_HE.scatter_add_(1, key_HR, torch.ones_like(key_HR))
    padded_HE = (counts_HE + block - 1) // block * block
    n_rows = int(padded_HE.sum(1).max())  # a host sync per layer, as published
    order_HR = torch.sort(key_HR, dim=1, stable=True).indices
    start_HE, padded_start_HE = (c.cumsum(1) - c for c in (counts_HE, padded_HE))
    sorted_key_HR = key_HR.gather(1, order_HR)
    shift_HR = (padded_start_HE - start_HE).gather(1, sorted_key_HR)
    place_HR = slots + shift_HR
    token_HR = torch.zeros(H, n_rows, dtype=torch.int64, device=x_THL.device)
    token_HR.scatter_(1, place_HR, order_HR // K)

    q_HRL = x_THL.transpose(0, 1).gather(1, token_HR[..., None].expand(-1, -1, L))
    keys, values = (w.to(x_THL.dtype).reshape(H, E * Fh, L) for w in (w_in_HEGFL, w_out_HEFL))
    first_HB = torch.arange(n_rows // block, device=x_THL.device).mul(block).expand(H, -1)
    ends_HE = padded_HE.cumsum(1)
    expert_HB = torch.searchsorted(ends_HE, first_HB.contiguous(), right=True).clamp(max=E - 1)
    run = _compiled(flex_attention) if x_THL.is_cuda else flex_attention
    o_HRL, aux = run(
        q_HRL[None],
        keys[None],
        values[None],
        score_mod=_log1p_gelu,
        block_mask=_mask(expert_HB, Fh // block, E * Fh // block, n_rows, E * Fh, block),
        scale=1.0,
        return_aux=AuxRequest(lse=True),
    )
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
    if activation == "gelu" and d_expert % 128 == 0:
        found["FlexAttention"] = flex
    if activation == "swiglu" and importlib.util.find_spec("liger_kernel"):
        found["liger-kernel"] = liger
    return found
