"""Grouped-query attention: the default token mixer.

B sequences · S positions · D model width · N query heads · M key/value heads · d head width.
A token mixer is a slot of the block: `forward` for training, `init_state` and `step` for decoding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.config import ModelConfig
from headway.kernels.attention import attention
from headway.kernels.rope import norm_rope, rope, rope_tables
from headway.model.linear import Linear, RMSNorm


@dataclass
class KVState:
    """Key/value cache of one layer: `[B, M, max_len, d]`, the first `length` are filled."""

    k: Tensor
    v: Tensor
    length: int = 0


class Attention(nn.Module):
    """Causal attention with RoPE, optional QK-norm, sliding window and per-head sigmoid output
    gate.

    `window`: tokens a position sees, itself included; 0 is all.
    """

    def __init__(self, config: ModelConfig, window: int = 0):
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.kv_heads
        self.d_head = config.head_width
        self.window, self.theta = window, config.rope_theta
        self.q = Linear(config.d_model, self.n_heads * self.d_head)
        self.k = Linear(config.d_model, self.n_kv_heads * self.d_head)
        self.v = Linear(config.d_model, self.n_kv_heads * self.d_head)
        self.o = Linear(self.n_heads * self.d_head, config.d_model)
        self.q_norm = RMSNorm(self.d_head, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.d_head, eps=config.norm_eps) if config.qk_norm else None
        self.gate = Linear(config.d_model, self.n_heads) if config.attn_gate else None

    def forward(self, x_BSD: Tensor, doc_BS: Tensor | None = None) -> Tensor:
        """`[B, S, D]` → `[B, S, D]`. `doc_BS` int32: positions attend only within their own
        document number.
        """
        S = x_BSD.shape[1]
        q, k, v = self._qkv(x_BSD, torch.arange(S, device=x_BSD.device))
        if doc_BS is None and not 0 < self.window < S:
            return self._output(attention(q, k, v), x_BSD)
        mask = causal_mask(S, S, self.window, x_BSD.device)
        if doc_BS is not None:
            mask = (mask & (doc_BS.unsqueeze(2) == doc_BS.unsqueeze(1))).unsqueeze(1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self._output(self._masked(q, k, v, mask), x_BSD)

    def init_state(
        self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> KVState:
        """An empty cache for `batch` sequences of at most `max_len` positions."""
        shape = (batch, self.n_kv_heads, max_len, self.d_head)
        return KVState(
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device),
        )

    def step(self, x_BSD: Tensor, state: KVState) -> Tensor:
        """The next S positions (a prompt, or one token), appended to the cache; `[B, S, D]`."""
        S, start = x_BSD.shape[1], state.length
        end = start + S
        positions = torch.arange(start, end, device=x_BSD.device)
        q, k, v = (t.transpose(1, 2) for t in self._qkv(x_BSD, positions))
        state.k[:, :, start:end], state.v[:, :, start:end], state.length = k, v, end
        mask = causal_mask(S, end, self.window, x_BSD.device)
        y = self._masked(q, state.k[:, :, :end], state.v[:, :, :end], mask)
        return self._output(y, x_BSD)

    def _qkv(self, x_BSD: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries, keys, values: `[B, S, heads, d]`."""
        q, k, v = (
            proj(x_BSD).unflatten(-1, (-1, self.d_head)) for proj in (self.q, self.k, self.v)
        )
        cos, sin = rope_tables(positions_S, self.d_head, self.theta, x_BSD.dtype)
        return _turned(q, self.q_norm, cos, sin), _turned(k, self.k_norm, cos, sin), v

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """From `[B, heads, S, d]`; `[B, S, N, d]`."""
        grouped = self.n_kv_heads != self.n_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return y.transpose(1, 2)

    def _output(self, y_BSNd: Tensor, x_BSD: Tensor) -> Tensor:
        if self.gate is not None:
            y_BSNd = y_BSNd * torch.sigmoid(self.gate(x_BSD)).unsqueeze(-1)
        return self.o(y_BSNd.flatten(-2))


def _turned(x: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor) -> Tensor:
    if norm is None:
        return rope(x, cos, sin)
    return norm_rope(x, norm.weight, norm.eps, cos, sin)


def causal_mask(n_queries: int, n_keys: int, window: int, device: torch.device) -> Tensor:
    """Boolean `[n_queries, n_keys]`, true where a query may look; the last query sits on the last
    key.
    """
    query = torch.arange(n_keys - n_queries, n_keys, device=device).unsqueeze(1)
    key = torch.arange(n_keys, device=device)
    mask = key <= query
    return mask & (key > query - window) if window else mask
