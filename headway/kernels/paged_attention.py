"""Attention of the new tokens of many sequences over a cache in pages of 16 positions.

T tokens of a pass · R sequences · P pages of the longest of them · N query heads · M key/value
heads · d, v widths of a key and of a value. In C++ (`cpu/paged_attention.cpp`, which has the layout
of a page) a query's result is the same bits whether its sequence came whole or in parts, alone or
beside others; elsewhere in PyTorch, whose sums depend on that."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention import attention, causal_mask
from headway.kernels.cpp import cpp_kernels
from headway.kernels.norm import HeadRotation
from headway.kernels.packed import batch_invariant

PAGE = 16
"""Positions of a page."""


class Pass(NamedTuple):
    """Which tokens a pass has, and the pages of their sequences."""

    segments: Tensor
    """int64 `[R, 3]`: the first token of a sequence in this pass, how many, the position of the
    first."""
    table_RP: Tensor
    """int32: page i holds positions 16·i … 16·i + 15 of a sequence."""


class Pages:
    """Keys and values of one layer: `n_pages` pages for M heads.

    Args:
        d_key: width of a key, and of a value of its own.
        d_value: where given, values are the first so many dims of their keys, and not stored."""

    def __init__(
        self,
        n_pages: int,
        n_heads: int,
        d_key: int,
        dtype: torch.dtype,
        device: torch.device,
        d_value: int | None = None,
    ):
        self.shared = d_value is not None
        self.d_value = d_key if d_value is None else d_value
        self.batch_invariant = batch_invariant(device, dtype)
        if self.batch_invariant:
            sizes = d_key, self.d_value, int(self.shared)
            units = cpp_kernels().compute("paged_units", dtype, *sizes)
            self.data = torch.zeros(n_pages, n_heads, units, dtype=torch.int32)
        else:  # keys, then values
            shape = (n_pages, 1 if self.shared else 2, PAGE, n_heads, d_key)
            self.data = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        """Return the size of all pages."""
        return self.data.nbytes

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page, for sequences that share all before it and now write it differently."""
        self.data[target] = self.data[source]


def paged_attention(
    q_TNd: Tensor,
    k_TMd: Tensor,
    v_TMv: Tensor | None,
    pages: Pages,
    where: Pass,
    window: int = 0,
    scale: float | None = None,
    sinks_N: Tensor | None = None,
    rotation: HeadRotation | None = None,
) -> Tensor:
    """Write keys and values to their pages; return the attention of the queries, each to its own
    sequence up to its own position, without gradient.

    Args:
        q_TNd, k_TMd, v_TMv: in the dtype of the pages; a token's heads lie together. No values for
        pages that have them in their keys.
        window: positions that a query sees, its own included; 0 is all.
        scale: of the scores; None is 1/√d.
        sinks_N: float32, one more score per head that takes weight and gives nothing.
        rotation: applied to queries and keys first; its tables have a row per token.
    Returns: `[T, N, v]`."""
    assert pages.shared == (v_TMv is None)
    scale = 1 / math.sqrt(q_TNd.shape[-1]) if scale is None else scale
    if not pages.batch_invariant:
        if rotation is not None:
            q_TNd, k_TMd = rotation(q_TNd, k_TMd)
        return _attend(q_TNd, k_TMd, v_TMv, pages, where, window, scale, sinks_N)
    q, k = _heads_together(q_TNd), _heads_together(k_TMd)
    v = None if v_TMv is None else _heads_together(v_TMv)
    out = torch.empty(*q.shape[:2], pages.d_value, dtype=q.dtype)
    pointers = q.data_ptr(), k.data_ptr(), 0 if v is None else v.data_ptr()
    strides = q.stride(0), k.stride(0), 0 if v is None else v.stride(0)
    sizes = (*where.table_RP.shape, q.shape[1], *k.shape[1:], pages.d_value, window)
    sinks = None if sinks_N is None else sinks_N.float().contiguous()
    turn: tuple = (None, None, None, None, 0.0)
    if rotation is not None:
        turn = (rotation.q_weight, rotation.k_weight, *rotation.tables, rotation.eps)
    arguments = (*pointers, *strides, *where, *sizes, float(scale), sinks, *turn, pages.data, out)
    cpp_kernels().call("paged_attention", q.dtype, *arguments)
    return out


def _heads_together(x_THd: Tensor) -> Tensor:
    """Return a view of a product's outputs as it is, anything else contiguous."""
    return x_THd if x_THd.stride()[1:] == (x_THd.shape[-1], 1) else x_THd.contiguous()


def _attend(
    q_TNd: Tensor,
    k_TMd: Tensor,
    v_TMv: Tensor | None,
    pages: Pages,
    where: Pass,
    window: int,
    scale: float,
    sinks_N: Tensor | None,
) -> Tensor:
    """Attend in PyTorch, one sequence after another."""
    out_TNv = q_TNd.new_empty(*q_TNd.shape[:2], pages.d_value)
    keys, values = pages.data[:, 0], pages.data[:, -1]
    for (first, n_new, start), page_P in zip(where.segments.tolist(), where.table_RP, strict=True):
        here, end = slice(first, first + n_new), start + n_new
        position = torch.arange(start, end, device=q_TNd.device)
        at = page_P[position // PAGE].long(), position % PAGE
        keys[at] = k_TMd[here]
        if v_TMv is not None:
            values[at] = v_TMv[here]
        base = max(start - window + 1, 0) // PAGE if window else 0  # the first page that is seen
        held = page_P[base : -(-end // PAGE)].long()
        k, v = (t[held].flatten(0, 1)[: end - PAGE * base].unsqueeze(0) for t in (keys, values))
        oldest = (position - window + 1).clamp(min=0) if window else None
        mask = causal_mask(position, end, oldest)[:, PAGE * base :]
        q = q_TNd[here].unsqueeze(0)
        # values are as wide as keys there
        y = attention(q, k, v, mask, sinks_N=sinks_N, scale=scale)[0]
        out_TNv[here] = y[..., : pages.d_value]
    return out_TNv


def paged_attention_reference(
    q_TNd: Tensor,
    k_TMd: Tensor,
    v_TMd: Tensor,
    window: int = 0,
    scale: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Return the attention of a whole sequence by the definition, in any dtype."""
    T, N, d = q_TNd.shape
    k, v = (t.repeat_interleave(N // t.shape[1], 1) for t in (k_TMd, v_TMd))
    score = torch.einsum("qnd,knd->nqk", q_TNd, k) * (d**-0.5 if scale is None else scale)
    key, query = torch.arange(T), torch.arange(T).unsqueeze(1)
    seen = (key <= query) & (key > query - (window or T))
    score = score.masked_fill(~seen, -torch.inf)
    if sinks_N is not None:
        score = torch.cat((score, sinks_N.to(score).view(-1, 1, 1).expand(-1, T, 1)), -1)
    return torch.einsum("nqk,knd->qnd", torch.softmax(score, -1)[..., :T], v)
