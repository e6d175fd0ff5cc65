"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 §2.1): keys and values of all heads
are read out of one latent vector per token, and the cache holds that vector.

    c = norm(W_c·x);  k = [W_k·c, RoPE(W_r·x)];  v = W_v·c;  q = [q_nope, RoPE(q_rope)]

Without a cache keys and values are computed (naive). With one the products with W_k and W_v move to
the query and the output (absorbed): q_nope·(W_k·c) = (W_kᵀ·q_nope)·c, so that attention is that of
N query heads with one key head, the latent vectors as they lie in the cache. The two forms round
differently; a cache knows one, so that a text gives the same bits whatever its chunks. A pair of
query and key costs N·(2C + r) products instead of N·(n + r + v), but no chunk reads keys and values
out of the whole cache again, C·N·(n + v) for each position. Both cost the same in chunks of
C·(n + v)/(2C − n − v) tokens, 171 with the sizes of DeepSeek-V3: a long text in short
chunks gains most, many short texts lose.

B sequences · S positions · D model width · N heads · C width of the latent vector · n, r dims of a
head that are not and that are rotated · v dims of a value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.config import ModelConfig
from headway.kernels.attention import attention
from headway.kernels.packed import PackedWeight, pack, packed_linear
from headway.kernels.rope import rope
from headway.model.context import Context, Positions
from headway.model.costs import NOTHING, Cost, CostGroup, Term, Workload, casts
from headway.model.linear import Linear, RMSNorm
from headway.model.mixers.attention import masks_of, mean_keys
from headway.model.paged import PagedLatent


@dataclass
class LatentState:
    """Latent vectors and rotated keys of one layer, `[B, max_len, C + r]`."""

    latent: Tensor
    width: int
    """C."""

    def attend(
        self, q_BSNw: Tensor, new_BSw: Tensor, positions: Positions, window: int, scale: float
    ) -> Tensor:
        """Write `[B, S, C + r]` at their positions; return the attention of queries
        `[B, S, N, C + r]` to all positions so far, `[B, S, N, C]`."""
        if positions.ragged:
            row = torch.arange(len(new_BSw), device=new_BSw.device).unsqueeze(1)
            self.latent[row, positions.index] = new_BSw
        else:
            self.latent[:, positions.start : positions.n_keys] = new_BSw
        k = self.latent[:, : positions.n_keys].unsqueeze(2)
        visible = positions.visible(window, q_BSNw.dtype)
        return attention(q_BSNw, k, k, *visible, scale=scale)[..., : self.width]


class MLA(nn.Module):
    """Causal latent attention; see the head of this file.

    `window`: tokens a position sees, itself included; 0 is all. Scores are multiplied by
    1/√(n + r), and with YaRN by `RopeConfig.score_factor`."""

    def __init__(self, config: ModelConfig, window: int = 0):
        super().__init__()
        self.config, self.window, c = config, window, config.mla
        D, N = config.d_model, config.n_heads
        self.scale = c.qk_width**-0.5 * config.rope.score_factor
        low = c.q_lora_rank
        # the norms of latent vectors take the published eps, whatever `norm_eps` is
        self.q_a = Linear(D, low, bias=config.qkv_bias) if low else None
        self.q_a_norm = RMSNorm(low) if low else None
        self.q_b = Linear(low or D, N * c.qk_width)
        self.kv_a = Linear(D, c.latent_width, bias=config.qkv_bias)
        self.kv_a_norm = RMSNorm(c.kv_lora_rank)
        self.kv_b = Linear(c.kv_lora_rank, N * (c.qk_nope_head_dim + c.v_head_dim))
        self.o = Linear(N * c.v_head_dim, D, bias=config.o_bias, ends_branch=True)
        self.packed: tuple[PackedWeight, PackedWeight] | None = None
        """W_kᵀ and W_v by head, for the absorbed form."""

    def pack(self, dtype: torch.dtype) -> None:
        if self.packed is None:
            key_NCn, value_NvC = self._by_head(self.kv_b.weight.detach())
            self.packed = pack(key_NCn, dtype), pack(value_NvC, dtype)

    def _by_head(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return W_kᵀ `[N, C, n]` and W_v `[N, v, C]`, views of the weight of `kv_b`."""
        c = self.config.mla
        both = weight.unflatten(0, (self.config.n_heads, -1))
        key_NnC, value_NvC = both.split((c.qk_nope_head_dim, c.v_head_dim), 1)
        return key_NnC.transpose(1, 2), value_NvC

    def forward(self, x_BSD: Tensor, ctx: Context = Context()) -> Tensor:
        """Map `[B, S, D]` to `[B, S, D]`; the S positions follow those in a cache."""
        positions = ctx.positions_of(x_BSD)
        q_nope, q_rope, c_BSC, k_rope = self._project(x_BSD, positions)
        if ctx.cache is None:
            visible = positions.visible(self.window, x_BSD.dtype)
            y_BSNv = self._naive(torch.cat((q_nope, q_rope), -1), c_BSC, k_rope, *visible)
        else:
            key, value = self.packed or self._by_head(self.kv_b.weight.to(x_BSD.dtype))
            q_BSNw = torch.cat((_head_by_head(q_nope, key), q_rope), -1)
            new_BSw, state = torch.cat((c_BSC, k_rope), -1), ctx.cache.state(ctx.layer)
            y_BSNC = state.attend(q_BSNw, new_BSw, positions, self.window, self.scale)
            y_BSNv = _head_by_head(y_BSNC, value)
        return self.o(y_BSNv.flatten(-2))

    def _project(
        self, x_BSD: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries `[B, S, N, n]` and `[B, S, N, r]`, latent vectors `[B, S, C]` and rotated
        keys `[B, S, r]`."""
        c, (B, S, _) = self.config.mla, x_BSD.shape
        low = x_BSD
        if self.q_a is not None and self.q_a_norm is not None:
            low = self.q_a_norm(self.q_a(x_BSD))
        q = self.q_b(low).unflatten(-1, (self.config.n_heads, -1))
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        c_BSC, k_rope = self.kv_a(x_BSD).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        # one row of the tables per position: as one sequence where the positions differ
        rows = (1, B * S) if positions.ragged else (B, S)
        tables = positions.rope(self.config, x_BSD.dtype)
        q_rope, k_rope = (
            rope(t.reshape(*rows, -1, c.qk_rope_head_dim), *tables, self.config.rope.interleaved)
            for t in (q_rope, k_rope)
        )
        return (
            q_nope,
            q_rope.view(*q.shape[:-1], -1),
            self.kv_a_norm(c_BSC),
            k_rope.view(B, S, -1),
        )

    def _naive(
        self,
        q_BSNd: Tensor,
        c_BKC: Tensor,
        k_rope_BKr: Tensor,
        mask: Tensor | None,
        first_BS: Tensor | None,
    ) -> Tensor:
        """Attend to keys and values of all heads → `[B, S, N, v]`."""
        c, N = self.config.mla, self.config.n_heads
        kv = self.kv_b(c_BKC).unflatten(-1, (N, -1))
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        k = torch.cat((k_nope, k_rope_BKr.unsqueeze(2).expand(-1, -1, N, -1)), -1)
        v = F.pad(v, (0, c.qk_width - c.v_head_dim))  # as wide as keys, for the kernel
        return attention(q_BSNd, k, v, mask, first_BS, None, self.scale)[..., : c.v_head_dim]

    def init_state(
        self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> LatentState:
        """Return an empty cache for `batch` sequences of at most `max_len` positions."""
        shape = (batch, max_len, self.config.mla.latent_width)
        empty = torch.zeros(shape, dtype=dtype, device=device)
        return LatentState(empty, self.config.mla.kv_lora_rank)

    def init_pages(self, n_pages: int, dtype: torch.dtype, device: torch.device) -> PagedLatent:
        """Return empty pages for the latent vectors of many sequences."""
        mla = self.config.mla
        return PagedLatent(n_pages, 1, mla.latent_width, dtype, device, mla.kv_lora_rank)

    def costs(self, work: Workload) -> Sequence[Cost]:
        """Those of the naive form. Saved are latent vectors before and after their norms, queries,
        keys, values and output at the width of keys, log-sum-exp, what `o` reads, and the rotary
        tables."""
        c, T, S, b = self.config.mla, work.n_tokens, work.seq_len, work.bytes_per_value
        N, d, low, C = self.config.n_heads, c.qk_width, c.q_lora_rank, c.kv_lora_rank
        layers = [p for p in (self.q_a, self.q_b, self.kv_a, self.kv_b, self.o) if p is not None]
        weights = sum(p.weight.numel() for p in layers)
        biases = sum(p.bias.numel() for p in layers if p.bias is not None)
        norms = low + C
        narrowed = N * c.v_head_dim if c.v_head_dim < d else 0  # else `o` reads the output itself
        saved = T * b * (4 * N * d + narrowed + 2 * C + c.qk_rope_head_dim + 2 * low)
        saved += 4 * T * (N + 1 + (low > 0)) + 4 * S * c.qk_rope_head_dim
        queries = "D·q + q·N·d" if low else "D·N·d"
        formula = f"({queries} + D·(C + r) + C·N·(n + v) + N·v·D)"
        scores = Term(4 * N * d * mean_keys(S, self.window), "4·N·d·mean keys seen")
        return (
            Cost(CostGroup.MIXER, Term(weights, formula), saved=Term(saved, "T·b·(4·N·d + N·v)")),
            Cost(CostGroup.MIXER, Term(biases, "biases") if biases else NOTHING),
            Cost(CostGroup.NORMS, Term(norms, "(q + C)")),
            Cost(CostGroup.PROJECTIONS, flops=Term(2 * weights, f"2·{formula}")),
            Cost(CostGroup.SCORES, flops=scores),
            Cost(CostGroup.MASKS, saved=masks_of(work, self.window)),
            casts(weights, work),
        )


def _head_by_head(x_BSNi: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """Multiply each head by its own matrix `[N, o, i]` → `[B, S, N, o]`."""
    if isinstance(weight, PackedWeight):
        return packed_linear(x_BSNi, weight)
    return torch.einsum("bsni,noi->bsno", x_BSNi, weight)
