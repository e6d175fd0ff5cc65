"""The one place that turns a config into the modules in the slots of a block.

A slot is filled by one class in one file and one `case` here. To try a module of your own, write a
function like `build_block` and give it to `Transformer(config, blocks=…)`:

    def blocks(config, layer, compute):
        return build_block(config, layer, compute, mixer=MyMixer(config))"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from headway.config import ModelConfig, UsageError
from headway.model.balance import RouteStats
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.costs import Cost, CostGroup, Term, Workload, costs_of
from headway.model.linear import FeedForward, RMSNorm
from headway.model.mixers.attention import Attention
from headway.model.mixers.mla import MLA
from headway.model.moe import SparseLayer
from headway.model.residual import Residual


class Mixer(Protocol):
    """What the mixer slot asks of a module."""

    def __call__(self, x_BSD: Tensor, ctx: Context, /) -> Tensor:
        """Map `[B, S, D]` to `[B, S, D]`."""
        ...

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Return an empty decoding state; `ctx.cache.state(ctx.layer)` hands it to `forward`."""
        ...


@runtime_checkable
class PagedMixer(Protocol):
    """What the inference engine asks of a mixer beside that."""

    window: int
    """Positions that a token sees, its own included; 0: all."""

    def init_pages(self, n_pages: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Return an empty decoding state in pages (`model.paged`), with `bytes`, `batch_invariant`
        and `copy_page`."""
        ...


class FeedForwardLayer(Protocol):
    """What the feed-forward slot asks of a module."""

    def __call__(self, x_BSD: Tensor, ctx: Context, /) -> tuple[Tensor, RouteStats | None]:
        """Map `[B, S, D]` to `[B, S, D]`, and statistics where tokens are routed."""
        ...


class Block(nn.Module):
    """A branch with a token mixer, then a branch with a feed-forward layer, each behind a norm."""

    def __init__(
        self,
        config: ModelConfig,
        mixer: Mixer,
        ffn: FeedForwardLayer,
        residual: type[Residual] = Residual,
    ):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = mixer
        self.norm2 = RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = ffn
        self.residual1, self.residual2 = residual(), residual()

    def forward(self, r: Tensor, ctx: Context) -> tuple[Tensor, RouteStats | None]:
        """Return the stream after both branches, and what the feed-forward layer reports."""
        r = self.residual1.write(r, self.mixer(self.norm1(self.residual1.read(r)), ctx))
        y_BSD, stats = self.ffn(self.norm2(self.residual2.read(r)), ctx)
        return self.residual2.write(r, y_BSD), stats

    @property
    def sparse(self) -> SparseLayer | None:
        """The sparse layer, if there is one."""
        return self.ffn if isinstance(self.ffn, SparseLayer) else None

    def costs(self, work: Workload) -> Sequence[Cost]:
        """Two norms save their input and its scale, beside their output; then both branches."""
        D = self.norm1.weight.shape[0]
        saved = Term(2 * work.n_tokens * (2 * D * work.bytes_per_value + 4), "2·T·(2·D·b + 4)")
        return [
            Cost(CostGroup.NORMS, Term(2 * D, "2·D")),
            Cost(CostGroup.RESIDUAL, saved=saved),
            *(c for part in self.slots() for c in costs_of(part, work)),
        ]

    def slots(self) -> tuple[object, ...]:
        """Return what fills the slots of the block."""
        return self.residual1, self.mixer, self.residual2, self.ffn


BlockBuilder = Callable[[ModelConfig, int, Compute], Block]
"""Builds block number `layer` of a model: `(config, layer, compute) → Block`."""


def build_block(
    config: ModelConfig,
    layer: int,
    compute: Compute = Compute(),
    *,
    mixer: Mixer | None = None,
    ffn: FeedForwardLayer | None = None,
    residual: type[Residual] = Residual,
) -> Block:
    """Return the block that a config describes, with given modules in place of the config's."""
    if mixer is None:
        mixer = build_mixer(config, layer)
    if ffn is None:
        ffn = build_feed_forward(config, layer, compute)
    return Block(config, mixer, ffn, residual)


def build_mixer(config: ModelConfig, layer: int) -> Mixer:
    """Return the token mixer of block `layer`."""
    match config.mixer:
        case "attention":
            return Attention(config, config.window_of(layer))
        case "mla":
            return MLA(config, config.window_of(layer))


def build_feed_forward(
    config: ModelConfig, layer: int, compute: Compute = Compute()
) -> SparseLayer | FeedForward:
    """Return the feed-forward layer of block `layer`."""
    if not config.is_sparse(layer):
        return FeedForward(config.d_model, config.d_ff, config.activation)
    match config.moe.kind:
        case "moe" | "latent" | "multi_head_latent":
            return SparseLayer(config.d_model, config.moe, compute, norm_eps=config.norm_eps)
        case kind:
            raise AssertionError(f"no sparse layer of kind {kind!r}")


def paged_mixers(blocks: Sequence[Block]) -> list[PagedMixer]:
    """Return the mixers of a model's blocks. Raise UsageError for one without pages."""
    if reason := without_pages(blocks):
        raise UsageError(f"{reason}, which inference needs; see PagedMixer in model/build.py")
    return [block.mixer for block in blocks if isinstance(block.mixer, PagedMixer)]


def page_bytes(mixers: Sequence[PagedMixer], dtype: torch.dtype) -> dict[int, int]:
    """Return the size of a page in all layers with the same window, by window."""
    meta, sizes = torch.device("meta"), dict.fromkeys((mixer.window for mixer in mixers), 0)
    for mixer in mixers:
        sizes[mixer.window] += mixer.init_pages(1, dtype, meta).bytes
    return sizes


def without_pages(blocks: Sequence[Block]) -> str:
    """Name the first mixer without pages; return "" where there is none."""
    for i, block in enumerate(blocks):
        if not isinstance(block.mixer, PagedMixer):
            return f"the mixer of block {i}, {type(block.mixer).__name__}, has no init_pages"
    return ""
