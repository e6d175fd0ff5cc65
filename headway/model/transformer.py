"""A decoder-only transformer: embed → blocks → norm → head → loss.

B sequences · S positions · T = B·S tokens · D model width · V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.config import ModelConfig
from headway.kernels.cross_entropy import cross_entropy
from headway.model.balance import RouteStats
from headway.model.dispatch import TokenDispatcher
from headway.model.init import init_weights, initial_weights
from headway.model.linear import FeedForward, Linear, RMSNorm
from headway.model.mixers.attention import Attention, KVState
from headway.model.moe import MoE, build_moe


class Output(NamedTuple):
    """What a forward pass gives."""

    nats: Tensor | None
    """Sum of −log p over the valid targets, float32 scalar; None without targets."""
    logits_BSV: Tensor | None
    """Float32 `[B, S, V]`; None with targets, since they are then never whole."""
    stats: tuple[RouteStats, ...]
    """One per sparse layer, first layer first."""


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)). `mixer` and `ffn` are slots."""

    def __init__(self, config: ModelConfig, mixer: Attention, ffn: MoE | FeedForward):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = mixer
        self.norm2 = RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = ffn

    def forward(
        self, x_BSD: Tensor, doc_BS: Tensor | None = None, dispatcher: TokenDispatcher | None = None
    ) -> tuple[Tensor, RouteStats | None]:
        x_BSD = x_BSD + self.mixer(self.norm1(x_BSD), doc_BS)
        return self._feed_forward(x_BSD, dispatcher)

    def step(
        self, x_BSD: Tensor, state: KVState, dispatcher: TokenDispatcher | None = None
    ) -> Tensor:
        """Decode the next positions; no slot is dropped."""
        x_BSD = x_BSD + self.mixer.step(self.norm1(x_BSD), state)
        return self._feed_forward(x_BSD, dispatcher, dropless=True)[0]

    def _feed_forward(
        self, x_BSD: Tensor, dispatcher: TokenDispatcher | None, dropless: bool = False
    ) -> tuple[Tensor, RouteStats | None]:
        z_BSD = self.norm2(x_BSD)
        if isinstance(self.ffn, MoE):
            y_BSD, stats = self.ffn(z_BSD, dispatcher=dispatcher, dropless=dropless)
            return x_BSD + y_BSD, stats
        return x_BSD + self.ffn(z_BSD), None


class Transformer(nn.Module):
    """The model of a config.

    Args:
        config: with `vocab_size` resolved (> 0).
        dtype: of the matmuls and the residual stream; parameters are float32 (`.double()` for
        references).
        recompute: constant-memory sparse layers.
        seed: of the initialisation.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        seed: int | None = None,
    ):
        super().__init__()
        assert config.vocab_size > 0, "vocab_size is resolved before the model is built"
        self.config, self.dtype = config, dtype
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            Block(config, Attention(config, _window(config, i)), _ffn(config, i, recompute))
            for i in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size)
        init_weights(self, n_layers=config.n_layers, embed_std=config.init_std, seed=seed)

    def initial(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Name and whole initial value of every parameter and buffer, one at a time: those that
        the constructor gives with this seed. For a model on the meta device."""
        c = self.config
        return initial_weights(self, n_layers=c.n_layers, embed_std=c.init_std, seed=seed)

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        doc_BS: Tensor | None = None,
        dispatcher: TokenDispatcher | None = None,
    ) -> Output:
        """Loss of `targets_BS` (−1 is ignored), or all logits without targets.

        Args: tokens_BS, targets_BS: int64 `[B, S]`. doc_BS: int32 `[B, S]` document numbers, to
        keep documents apart. dispatcher: the processes over which the sparse layers are spread.
        """
        x_BSD = self.embed(tokens_BS).to(self.dtype)
        stats = []
        for i, block in enumerate(self.layers):
            x_BSD, s = block(x_BSD, doc_BS, dispatcher and dispatcher.at(i))
            if s is not None:
                stats.append(s)
        x_BSD = self.norm(x_BSD)
        if targets_BS is None:
            return Output(None, self._logits(x_BSD), tuple(stats))
        nats = cross_entropy(
            x_BSD.flatten(0, 1),
            self._head_weight(),
            targets_BS.flatten(),
            self.config.logit_softcap,
        )
        return Output(nats, None, tuple(stats))

    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [block for block in self.layers if isinstance(block, Block)]

    def sparse_layers(self) -> list[MoE]:
        """The sparse layers, first layer first: the order of `Output.stats`."""
        return [ffn for block in self.blocks() if isinstance(ffn := block.ffn, MoE)]

    def init_state(self, batch: int, max_len: int) -> list[KVState]:
        """Empty caches for decoding `batch` sequences of at most `max_len` positions."""
        device = self.embed.weight.device
        return [
            block.mixer.init_state(batch, max_len, self.dtype, device) for block in self.blocks()
        ]

    @torch.no_grad()
    def step(
        self, tokens_BS: Tensor, state: list[KVState], dispatcher: TokenDispatcher | None = None
    ) -> Tensor:
        """Append tokens (a prompt, or one per sequence) and return the logits after the last,
        float32 `[B, V]`. Dropless whatever the capacity, so that a text does not depend on the
        pieces in which it is decoded.
        """
        x_BSD = self.embed(tokens_BS).to(self.dtype)
        for i, (block, s) in enumerate(zip(self.blocks(), state, strict=True)):
            x_BSD = block.step(x_BSD, s, dispatcher and dispatcher.at(i))
        return self._logits(self.norm(x_BSD[:, -1]))

    def _head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def _logits(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self._head_weight().to(x.dtype))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


def _window(config: ModelConfig, layer: int) -> int:
    return config.window[layer % len(config.window)] if config.window else 0


def _ffn(config: ModelConfig, layer: int, recompute: bool) -> MoE | FeedForward:
    if config.moe.kind == "dense" or layer < config.moe.n_dense_layers:
        return FeedForward(config.d_model, config.d_ff, config.activation)
    return build_moe(config.d_model, config.moe, recompute, config.norm_eps)
