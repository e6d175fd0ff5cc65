"""A decoder-only transformer: embed → blocks → norm → head → loss.

B sequences · S positions · T = B·S tokens · D model width · V vocabulary."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.config import ModelConfig
from headway.kernels.activation import softcap
from headway.kernels.cross_entropy import cross_entropy, target_and_best, token_log_probs
from headway.kernels.packed import PackedWeight, packed_linear
from headway.kernels.precision import widen
from headway.model.balance import RouteReport, RouteStats
from headway.model.build import Block, BlockBuilder, build_block
from headway.model.compute import Compute
from headway.model.context import Context, DenseCache
from headway.model.costs import NOTHING, Cost, CostGroup, Term, Workload, costs_of
from headway.model.init import init_weights, initial_weights
from headway.model.linear import Embedding, Linear, RMSNorm
from headway.model.moe import SparseLayer


class Output(NamedTuple):
    """What a forward pass gives."""

    nats: Tensor | None
    """Sum of −log p over the valid targets, float32 scalar; None without targets."""
    logits_BSV: Tensor | None
    """Float32 `[B, S, V]`, `[B, 1, V]` with `Context.last_only`, `[1, R, V]` with `Context.rows_R`;
    None with targets, since they are then never in memory all at once."""
    stats: tuple[RouteStats, ...]
    """One per sparse layer, first layer first."""
    log_probs_BS: Tensor | None = None
    """Float32 `[B, S]`, log p of each target, 0 where it is ignored; with `Context.log_probs`."""
    best_log_probs_BS: Tensor | None = None
    """Float32 `[B, S]`, log p of the likeliest token at each target: equal to `log_probs_BS` where
    that is the target, and only there; with `Context.best_log_probs`."""

    @property
    def routes(self) -> tuple[RouteReport | None, ...]:
        """What `Context.report` asked for, one per sparse layer."""
        return tuple(stats.report for stats in self.stats)


class Transformer(nn.Module):
    """The model of a config.

    Args:
        config: with `vocab_size` resolved (> 0).
        compute: dtype of the matmuls, what is kept for backward.
        seed: of the initialisation.
        blocks: builds each block; `build_block` does it as the config says.
    Raises: UsageError for a parameter without a role."""

    def __init__(
        self,
        config: ModelConfig,
        compute: Compute = Compute(),
        *,
        seed: int | None = None,
        blocks: BlockBuilder = build_block,
    ):
        super().__init__()
        assert config.vocab_size > 0, "vocab_size is resolved before the model is built"
        self.config, self.dtype = config, compute.dtype
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(blocks(config, i, compute) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, head=True)
        init_weights(self, n_layers=config.n_layers, embed_std=config.init_std, seed=seed)

    def initial(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield name and full initial value of every parameter and buffer, one at a time: those
        that the constructor gives with this seed. For a model on the meta device."""
        c = self.config
        return initial_weights(self, n_layers=c.n_layers, embed_std=c.init_std, seed=seed)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None = None, ctx: Context = Context()
    ) -> Output:
        """Return the loss of `targets_BS` (−1 is ignored), or logits without targets.

        Args: tokens_BS, targets_BS: int64 `[B, S]`. With `ctx.cache` the tokens follow those that
        it holds, and are added to it."""
        x_BSD = self.embed(tokens_BS).to(self.dtype)
        blocks = self.blocks()
        ctx = self._with_positions(x_BSD, ctx)
        stream = blocks[0].residual1
        x_BSD = stream.expand(x_BSD)
        stats: list[RouteStats] = []
        for i, block in enumerate(blocks):
            x_BSD, s = block(x_BSD, ctx.at(i, len(stats)))
            if s is not None:
                stats.append(s)
        x_BSD = stream.reduce(x_BSD)
        if ctx.cache is not None:
            ctx.cache.advance(ctx.n_new or [tokens_BS.shape[1]] * len(tokens_BS))
        if targets_BS is None:
            x_BSD = self.norm(_wanted(x_BSD, ctx))
            return Output(None, self._logits(x_BSD), tuple(stats))
        x_TD, target_T = self.norm(x_BSD).flatten(0, 1), targets_BS.flatten()
        cap, packed = self.config.logit_softcap, self._packed_head()
        best_BS = None
        if packed is not None or ctx.best_log_probs:
            weight = self._head_weight() if packed is None else packed
            log_probs_T, best_T = target_and_best(x_TD, weight, target_T, cap)
            best_BS = best_T.view(targets_BS.shape) if ctx.best_log_probs else None
        elif ctx.log_probs:
            log_probs_T = token_log_probs(x_TD, self._head_weight(), target_T, cap)
        else:
            nats = cross_entropy(x_TD, self._head_weight(), target_T, cap)
            return Output(nats, None, tuple(stats))
        given = ctx.log_probs or ctx.best_log_probs
        log_probs_BS = log_probs_T.view(targets_BS.shape) if given else None
        return Output(-log_probs_T.sum(), None, tuple(stats), log_probs_BS, best_BS)

    def blocks(self) -> list[Block]:
        """Return the layers, typed."""
        return [block for block in self.layers if isinstance(block, Block)]

    def sparse_layers(self) -> list[SparseLayer]:
        """Return the sparse layers, first layer first: the order of `Output.stats`."""
        return [layer for block in self.blocks() if (layer := block.sparse) is not None]

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def init_cache(self, batch: int, max_len: int) -> DenseCache:
        """Return an empty cache for decoding `batch` sequences of at most `max_len` positions."""
        states = [
            block.mixer.init_state(batch, max_len, self.dtype, self.device)
            for block in self.blocks()
        ]
        return DenseCache(states, batch)

    def _with_positions(self, x_BSD: Tensor, ctx: Context) -> Context:
        """Make tables and masks once for all layers, outside of what `block.compile` compiles."""
        positions = ctx.positions_of(x_BSD)
        positions.prepare(self.config, self.dtype)
        return replace(ctx, positions=positions)

    def pack(self, dtype: torch.dtype) -> None:
        """Pack a table that is the output head too; otherwise each packs itself."""
        if self.head is None and self.embed.packed is None:
            self.embed.pack_as_head(dtype)

    @property
    def is_packed(self) -> bool:
        """Whether the weights were packed for inference."""
        return self._packed_head() is not None

    def _packed_head(self) -> PackedWeight | None:
        return self.embed.packed if self.head is None else self.head.packed

    def _head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def _logits(self, x: Tensor) -> Tensor:
        packed, cap = self._packed_head(), self.config.logit_softcap
        if packed is not None:
            return softcap(packed_linear(x, packed, wide=True), cap)
        return softcap(widen(F.linear(x, self._head_weight().to(x.dtype))), cap)

    def costs(self, work: Workload) -> list[Cost]:
        """Return the costs of all modules. The embedding counts as active in full, as is usual,
        although a token reads one row of it. Raises UsageError for a module that declares none."""
        V, D = self.embed.weight.shape
        T, b, heads = work.n_tokens, work.bytes_per_value, 1 if self.head is None else 2
        loss = Term(T * D * b + 4 * V * D, "T·D·b + 4·V·D, kept in place of logits")
        return [
            Cost(CostGroup.EMBEDDING, Term(heads * V * D, f"{heads}·V·D")),
            *self._block_costs(work),
            Cost(CostGroup.NORMS, Term(D, "D")),
            Cost(CostGroup.RESIDUAL, saved=Term(T * (D * b + 12), "T·(D·b + 12)")),
            Cost(CostGroup.HEAD, flops=Term(2 * V * D, "2·V·D")),
            Cost(CostGroup.LOSS, saved=loss),
        ]

    def _block_costs(self, work: Workload) -> Iterator[Cost]:
        """Yield the costs of the blocks. One in several places (looped depth) computes in each, and
        has its parameters once."""
        counted = set[Block]()
        for block in self.blocks():
            for cost in costs_of(block, work):
                again = block in counted
                yield replace(cost, parameters=NOTHING, active=None) if again else cost
            counted.add(block)


def _wanted(x_BSD: Tensor, ctx: Context) -> Tensor:
    """Return the rows whose logits the context asks for: `[1, R, D]`, `[B, 1, D]` after the last
    real token of each sequence, or all."""
    if ctx.rows_R is not None:
        return x_BSD[:, ctx.rows_R]
    if not ctx.last_only:
        return x_BSD
    if ctx.n_new is None:
        return x_BSD[:, -1:]
    row = torch.arange(len(x_BSD), device=x_BSD.device)
    return x_BSD[row, torch.tensor(ctx.n_new, device=x_BSD.device) - 1].unsqueeze(1)
