"""What a forward pass reads beside its tokens: one object, handed down to every layer.

Training, prefill and decoding are the same `forward(x, ctx)`; what differs is in the context.

B sequences · S new positions · M key/value heads · d head width."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.config import ModelConfig, RopeConfig, UsageError
from headway.kernels.attention import causal_mask, reads_first
from headway.kernels.rope import rope_tables
from headway.model.dispatch import LOCAL, TokenDispatcher

REPORTS = frozenset({"routes", "logits", "norms"})


class Cache(Protocol):
    """The decoding state of all layers of a model for B sequences."""

    def positions(self, batch: int, n_new: int, device: torch.device) -> "Positions":
        """Return where the tokens `[batch, n_new]` of a pass stand."""
        ...

    def state(self, layer: int) -> Any:
        """Return the state that the mixer of a layer made in `init_state`."""
        ...

    def advance(self, n_new: Sequence[int]) -> None:
        """Count the positions of the current pass, which all layers have written."""
        ...


class DenseCache:
    """A cache with room for the same number of positions in each sequence."""

    def __init__(self, states: Sequence[Any], batch: int) -> None:
        self._states, self.lengths = list(states), [0] * batch

    def positions(self, batch: int, n_new: int, device: torch.device) -> "Positions":
        return Positions(batch, n_new, device, self.lengths)

    def state(self, layer: int) -> Any:
        return self._states[layer]

    def advance(self, n_new: Sequence[int]) -> None:
        self.lengths = [held + n for held, n in zip(self.lengths, n_new, strict=True)]


class Positions:
    """Where the S new tokens of each sequence stand, with the tables and masks that mixers share:
    each is computed once per pass."""

    make_tables = staticmethod(rope_tables)

    def __init__(
        self,
        batch: int,
        n_new: int,
        device: torch.device,
        lengths: Sequence[int] | None = None,
        doc_BS: Tensor | None = None,
    ) -> None:
        held = lengths or [0] * batch
        self.ragged = len(set(held)) > 1
        """Whether sequences hold different numbers of positions."""
        self.start, self.n_new, self.n_keys = held[0], n_new, max(held) + n_new
        self.doc_BS, self.device, self._batch = doc_BS, device, batch
        held_B1 = torch.tensor(held, device=device).unsqueeze(1) if self.ragged else self.start
        self.index = held_B1 + torch.arange(n_new, device=device)
        """int64 `[S]`, or `[B, S]` where ragged."""
        self._tables: dict[tuple[int, float, RopeConfig, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._visible: dict[tuple[int, torch.dtype], tuple[Tensor | None, Tensor | None]] = {}

    def prepare(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Make tables and masks of all layers now, outside of what `block.compile` compiles."""
        self.rope(config, dtype)
        for window in set(config.window) or {0}:
            self.visible(window, dtype)

    def rope(self, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return `kernels.rope.rope_tables`, a row for each of S (ragged: B·S) positions."""
        key = config.rotary_width, config.rope_theta, config.rope, dtype
        if key not in self._tables:
            width, theta, rope, _ = key
            self._tables[key] = self.make_tables(self.index.flatten(), width, theta, dtype, rope)
        return self._tables[key]

    def visible(self, window: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return `mask` and `first_BS` of `kernels.attention.attention` for matmuls in `dtype`: at
        most one is given, the mask (`[S, keys]`, or `[B, 1, S, keys]` where sequences differ) where
        no kernel reads the other. Neither: attention is causal."""
        key = window, dtype
        if key not in self._visible:
            self._visible[key] = self._visible_of(window, dtype)
        return self._visible[key]

    def _visible_of(self, window: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        first = self._first(window)
        square = self.n_new == self.n_keys
        if first is None and (square or self.n_new == 1) and not self.ragged:
            return None, None
        if first is not None and square and reads_first(self.device, dtype):
            return None, first.expand(self._batch, -1).int().contiguous()
        mask = causal_mask(self.index, self.n_keys, first)
        return (mask.unsqueeze(1) if mask.dim() == 3 else mask), None

    def _first(self, window: int) -> Tensor | None:
        """Return the first key that each new position sees, `[S]` or `[B, S]`; None is key 0."""
        first = None
        if 0 < window < self.n_keys:
            first = (self.index - window + 1).clamp(min=0)
        if self.doc_BS is not None:
            begins = F.pad(self.doc_BS[:, 1:] != self.doc_BS[:, :-1], (1, 0))
            start_BS = (begins * self.index).cummax(1).values
            first = start_BS if first is None else torch.maximum(start_BS, first)
        return first


@dataclass(frozen=True)
class Context:
    """All that a forward pass reads beside its tokens. The default is plain training in one
    process."""

    doc_BS: Tensor | None = None
    """int32 `[B, S]` document numbers: positions attend only within their own document, which is a
    run of equal numbers."""
    cache: Cache | None = None
    """Where decoding continues: keys and values are appended, and no slot is dropped whatever the
    capacity, so that a text does not depend on the parts in which it is decoded."""
    n_new: tuple[int, ...] | None = None
    """With a cache: how many of the S tokens of each sequence are real, the first ones; the outputs
    of the others mean nothing. None: all."""
    dispatcher: TokenDispatcher = LOCAL
    """Exchanges the tokens of sparse layers with other processes."""
    replay: tuple[Tensor, ...] = ()
    """Experts to use instead of choosing some: int64 `[T, H, K]` of this process's tokens, one per
    sparse layer. Gates and statistics are those of the given experts."""
    report: frozenset[str] = frozenset()
    """What sparse layers return in `RouteStats.report`: any of `routes` (indices and gates),
    `logits`, `norms` (of the experts' outputs)."""
    log_probs: bool = False
    """With targets: give the log-probability of each, with gradient, beside their sum; one more
    matmul with the output head in backward."""
    best_log_probs: bool = False
    """With targets: give the log-probability of each and of the likeliest token there, without
    gradient."""
    last_only: bool = False
    """Without targets: give the logits after the last real token of each sequence alone."""
    rows_R: Tensor | None = None
    """Without targets, of one sequence: give the logits after these of its tokens alone, int64
    `[R]`."""
    positions: Positions | None = None
    """Set by the model for its layers."""
    layer: int = 0
    """Index of the block that reads this."""
    sparse_layer: int = 0
    """Index among the sparse layers."""

    def __post_init__(self) -> None:
        if not self.report <= REPORTS:
            raise UsageError(f"report={set(self.report)} names more than {set(REPORTS)}")

    def at(self, layer: int, sparse_layer: int) -> "Context":
        """Return the context of one block. Without cache, replay and other processes all blocks
        share one, so that compiled blocks share their code."""
        if self.cache is None and not self.replay and self.dispatcher is LOCAL:
            return self
        dispatcher = self.dispatcher.at(layer)
        return replace(self, layer=layer, sparse_layer=sparse_layer, dispatcher=dispatcher)

    def positions_of(self, x_BSD: Tensor) -> Positions:
        """Return the positions of this pass, or make those of a mixer that is used alone."""
        if self.positions is not None:
            return self.positions
        B, S, _ = x_BSD.shape
        if self.cache is not None:
            assert self.doc_BS is None, "a cache holds one document per sequence"
            return self.cache.positions(B, S, x_BSD.device)
        return Positions(B, S, x_BSD.device, doc_BS=self.doc_BS)
