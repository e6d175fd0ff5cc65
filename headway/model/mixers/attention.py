"""Grouped-query attention: the default token mixer.

B sequences · S positions · D model width · N query heads · M key/value heads · d head width."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headway.config import ModelConfig
from headway.kernels.activation import gate_heads
from headway.kernels.attention import attention
from headway.kernels.norm import HeadRotation
from headway.kernels.packed import PackedWeight, packed_linear
from headway.kernels.rope import rope
from headway.model.context import Context, Positions
from headway.model.costs import NOTHING, Cost, CostGroup, Term, Workload, casts
from headway.model.linear import Linear, RMSNorm, pack_together
from headway.model.paged import PagedKV
from headway.model.roles import Group, Init, Role, StoresByRole


@dataclass
class KVState:
    """Keys and values of one layer, `[B, M, max_len, d]`."""

    k: Tensor
    v: Tensor
    rotates = False
    """Whether `attend` takes queries and keys that are not rotated yet."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Positions,
        window: int,
        sinks_N: Tensor | None = None,
        rotation: None = None,
    ) -> Tensor:
        """Append keys and values `[B, S, M, d]`; return the attention of queries `[B, S, N, d]` to
        all positions so far."""
        k, v = self._append(k, v, positions)
        return attention(q, k, v, *positions.visible(window, q.dtype), sinks_N)

    def _append(
        self, k_BSMd: Tensor, v_BSMd: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values at their positions; return those of all positions so far, views
        `[B, keys, M, d]`."""
        views = []
        for cache, new in ((self.k, k_BSMd), (self.v, v_BSMd)):
            held = cache.transpose(1, 2)
            if positions.ragged:
                row = torch.arange(len(new), device=new.device).unsqueeze(1)
                held[row, positions.index] = new
            else:
                held[:, positions.start : positions.n_keys] = new
            views.append(held[:, : positions.n_keys])
        return views[0], views[1]


class Attention(StoresByRole):
    """Causal attention with RoPE, optional biases, QK-norm, clamping, sliding window, sinks and
    per-head sigmoid output gate.

    `window`: tokens a position sees, itself included; 0 is all. Norm and rotation are one kernel
    with `qk_norm` none or head, without `clip_qkv` and where halves of whole heads are rotated, and
    part of the attention over pages."""

    def __init__(self, config: ModelConfig, window: int = 0):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.kv_heads
        self.d_head = config.head_width
        self.config, self.window = config, window
        D, d = config.d_model, self.d_head
        self.q = Linear(D, self.n_heads * d, bias=config.qkv_bias)
        self.k = Linear(D, self.n_kv_heads * d, bias=config.qkv_bias)
        self.v = Linear(D, self.n_kv_heads * d, bias=config.qkv_bias)
        self.o = Linear(self.n_heads * d, D, bias=config.o_bias, ends_branch=True)
        self.q_norm, self.k_norm = _qk_norm(config, self.n_heads), _qk_norm(config, self.n_kv_heads)
        self.gate = Linear(D, self.n_heads) if config.attn_gate else None
        self.sinks_N = nn.Parameter(torch.empty(self.n_heads)) if config.sinks else None
        self.packed: PackedWeight | None = None
        """q, k, v and the gate as one product."""
        self.widths = [len(layer.weight) for layer in self._inputs()]
        rotates_halves = not config.rope.interleaved and config.rotary_width == d
        self.is_plain = rotates_halves and not config.clip_qkv and config.qk_norm != "all"
        """Whether one kernel norms and rotates a head."""

    def roles(self) -> dict[str, Role]:
        return {"sinks_N": Role(Group.VECTOR, Init.ZEROS)}

    def pack(self, dtype: torch.dtype) -> None:
        if self.packed is None:
            self.packed = pack_together(self._inputs(), dtype)

    def _inputs(self) -> list[Linear]:
        """Return the layers that read the block's input."""
        return [self.q, self.k, self.v, *([] if self.gate is None else [self.gate])]

    def forward(self, x_BSD: Tensor, ctx: Context = Context()) -> Tensor:
        """Map `[B, S, D]` to `[B, S, D]`; the S positions follow those in a cache."""
        positions = ctx.positions_of(x_BSD)
        state = None if ctx.cache is None else ctx.cache.state(ctx.layer)
        q, k, v, *gate = self._project(x_BSD)
        rotation = self._rotation(positions.rope(self.config, q.dtype))
        q, k, v = (t.unflatten(-1, (-1, self.d_head)) for t in (q, k, v))
        if rotation is None or state is None or not state.rotates:
            q, k, v = self._turn(q, k, v, positions, rotation)
            rotation = None
        if state is None:
            seen = positions.visible(self.window, q.dtype)
            y_BSNd = attention(q, k, v, *seen, self.sinks_N)
        else:
            y_BSNd = state.attend(q, k, v, positions, self.window, self.sinks_N, rotation)
        if gate:
            y_BSNd = gate_heads(y_BSNd, gate[0])
        return self.o(y_BSNd.flatten(-2))

    def init_state(
        self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> KVState:
        """Return an empty cache for `batch` sequences of at most `max_len` positions."""
        shape = (batch, self.n_kv_heads, max_len, self.d_head)
        return KVState(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )

    def init_pages(self, n_pages: int, dtype: torch.dtype, device: torch.device) -> PagedKV:
        """Return empty pages for the keys and values of many sequences."""
        return PagedKV(n_pages, self.n_kv_heads, self.d_head, dtype, device)

    def _project(self, x_BSD: Tensor) -> Sequence[Tensor]:
        """Return queries, keys, values, each `[B, S, heads·d]`, and the gate `[B, S, N]` if there
        is one."""
        if self.packed is None:
            return [layer(x_BSD) for layer in self._inputs()]
        return packed_linear(x_BSD, self.packed).split(self.widths, -1)

    def _rotation(self, tables: tuple[Tensor, Tensor]) -> HeadRotation | None:
        """Return norm and rotation as one kernel does them, if it can."""
        if not self.is_plain:
            return None
        q_norm, k_norm = self.q_norm, self.k_norm
        if q_norm is None or k_norm is None:
            return HeadRotation(tables, None, None, 0.0)
        return HeadRotation(tables, q_norm.weight, k_norm.weight, q_norm.eps)

    def _turn(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, rotation: HeadRotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, clamp and rotate `[B, S, heads, d]`."""
        shape = q.shape[:2]
        if positions.ragged:  # one row of the tables per position: as one sequence
            q, k = (t.reshape(1, -1, *t.shape[2:]) for t in (q, k))
        if rotation is not None:
            q, k = rotation(q, k)
        else:
            tables = positions.rope(self.config, q.dtype)
            q, k = self._rotated(q, self.q_norm, tables), self._rotated(k, self.k_norm, tables)
        return q.view(*shape, *q.shape[2:]), k.view(*shape, *k.shape[2:]), self._clamped(v)

    def _rotated(self, x: Tensor, norm: RMSNorm | None, tables: tuple[Tensor, Tensor]) -> Tensor:
        if norm is not None:
            x = norm(x.flatten(-2)).view(x.shape) if self.config.qk_norm == "all" else norm(x)
        return rope(self._clamped(x), *tables, self.config.rope.interleaved)

    def _clamped(self, x: Tensor) -> Tensor:
        limit = self.config.clip_qkv
        return x.clamp(-limit, limit) if limit else x

    def costs(self, work: Workload) -> Sequence[Cost]:
        """Saved are queries, keys, values, output, log-sum-exp, inputs and scales of QK-norm, and
        the rotary tables. Scores count the keys that causality and the window leave."""
        T, S, b = work.n_tokens, work.seq_len, work.bytes_per_value
        D, N, M, d = self.q.weight.shape[1], self.n_heads, self.n_kv_heads, self.d_head
        weights, formula = D * d * (2 * N + 2 * M), "D·d·(2N + 2M)"
        saved = T * b * d * (2 * N + 2 * M) + 4 * T * N + 4 * S * self.config.rotary_width
        norms = NOTHING
        if self.gate is not None:
            weights, formula = weights + D * N, "(D·d·(2N + 2M) + D·N)"
            saved += T * N * b + T * N * d * b
        if self.q_norm is not None and self.k_norm is not None:
            norms = Term(2 * d, "2·d")
            rows = N + M
            if self.config.qk_norm == "all":
                norms, rows = Term((N + M) * d, "(N + M)·d"), 2
            saved += T * ((N + M) * d * b + 4 * rows)
        if self.config.clip_qkv:
            saved += T * b * d * (N + 2 * M)
        biases = sum(p.bias.numel() for p in (self.q, self.k, self.v, self.o) if p.bias is not None)
        biases += 0 if self.sinks_N is None else N
        scores = Term(4 * N * d * mean_keys(S, self.window), "4·N·d·mean keys seen")
        saved_term = Term(saved, "T·b·d·(3N + 3M), of it N + M for QK-norm")
        return (
            Cost(CostGroup.MIXER, Term(weights, formula), saved=saved_term),
            Cost(CostGroup.MIXER, Term(biases, "biases and sinks")),
            Cost(CostGroup.NORMS, norms),
            Cost(CostGroup.PROJECTIONS, flops=Term(2 * weights, f"2·{formula}")),
            Cost(CostGroup.SCORES, flops=scores),
            Cost(CostGroup.MASKS, saved=masks_of(work, self.window)),
            casts(weights, work),
        )


def mean_keys(seq_len: int, window: int) -> float:
    """Return how many keys a position sees on average over a sequence, itself included:
    (S + 1)/2 with full attention."""
    w = min(window or seq_len, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


def masks_of(work: Workload, window: int) -> Term:
    """Return the bytes of what keeps documents and windows apart."""
    T, S, b = work.n_tokens, work.seq_len, work.bytes_per_value
    if not work.doc_mask and not 0 < window < S:
        return NOTHING
    if not work.dense_masks:
        return Term(4 * T, "4·B·S")
    rows, formula = (T, "B·S·S·b") if work.doc_mask else (S, "S·S·b")
    return Term(rows * S * b, formula)


def _qk_norm(config: ModelConfig, n_heads: int) -> RMSNorm | None:
    match config.qk_norm:
        case "none":
            return None
        case "head":
            return RMSNorm(config.head_width, eps=config.norm_eps)
        case "all":
            return RMSNorm(n_heads * config.head_width, eps=config.norm_eps)
