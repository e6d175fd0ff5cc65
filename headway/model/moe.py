"""The sparse layers, drop-in `nn.Module`s: flat MoE, LatentMoE, Multi-Head LatentMoE.

T tokens · D model width · H heads · L width of one head · E experts per head · K chosen. All three
are one forward pass; they differ in how a token is split before routing and merged after it:

| layer | heads | expert width | router reads |
|---|---|---|---|
| `MoE` | 1 | D | the token |
| `LatentMoE` (arXiv 2601.18089) | 1 | ℓ < D | the token |
| `MultiHeadLatentMoE` (arXiv 2602.04870) | H | L, H·L = D_L | its sub-token, or the token |
"""

import math

import torch
from torch import Tensor, nn

from headway.config import (
    Activation,
    BalanceConfig,
    MoEConfig,
    Precision,
    RouterConfig,
    UsageError,
    n_inputs,
)
from headway.model.balance import RouteStats, merge_stats
from headway.model.dispatch import ChunkTask, Steps, TokenDispatcher, run_interleaved
from headway.model.experts import Experts
from headway.model.init import init_weights
from headway.model.linear import FeedForward, Linear, RMSNorm
from headway.model.router import Router


class MoE(nn.Module):
    """Flat mixture of experts at full width D, and the frame of the other two layers.

    Args:
        d_model, n_experts, top_k, d_expert: D, E, K, F.
        activation: of experts and shared expert.
        d_shared: hidden width of a shared expert at full width D; 0 means none.
        router, balance: how scores become gates; which bias rule selects.
        capacity_factor: 0 is dropless; else an expert takes at most ⌈factor·S·K/E⌉ rows of each
            sequence of S tokens, the first ones.
        recompute: constant-memory form.
        precision: of the experts' products in the forward pass; see `MoEConfig.precision`.
    Raises: UsageError where the sizes do not fit; in `forward`, where float8 cannot run.

    Weights may be stored in float32, bfloat16 or float16 (`layer.bfloat16()`); scores, gates and
    the selection bias stay float32. Matmuls run in the dtype of x.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        d_expert: int,
        *,
        activation: Activation = "swiglu",
        d_shared: int = 0,
        router: RouterConfig = RouterConfig(),
        balance: BalanceConfig = BalanceConfig(),
        capacity_factor: float = 0.0,
        recompute: bool = False,
        precision: Precision = "bfloat16",
    ):
        super().__init__()
        self._build(
            d_model,
            1,
            d_model,
            n_experts,
            top_k,
            d_expert,
            activation,
            d_shared,
            router,
            balance,
            capacity_factor,
            recompute,
            precision,
        )
        init_weights(self)

    def _build(
        self,
        d_model,
        n_heads,
        d_head,
        n_experts,
        top_k,
        d_expert,
        activation,
        d_shared,
        router,
        balance,
        capacity_factor,
        recompute,
        precision,
    ) -> None:
        self.n_heads = n_heads
        self.reads_token = router.reads == "token"
        d_router = d_model if self.reads_token else d_head
        self.router = Router(
            n_heads, d_router, n_experts, top_k, router, balance, capacity_factor, recompute
        )
        self.experts = Experts(
            n_heads, n_experts, d_head, d_expert, activation, recompute, precision
        )
        self.shared = FeedForward(d_model, d_shared, activation) if d_shared else None

    def split(self, x_TD: Tensor) -> Tensor:
        """`[T, D]` → sub-tokens `[T, H, L]`; here the token itself, H = 1."""
        return x_TD.unsqueeze(1)

    def merge(self, y_THL: Tensor) -> Tensor:
        """`[T, H, L]` → `[T, D]`."""
        return y_THL.squeeze(1)

    def forward(
        self,
        x: Tensor,
        index_THK: Tensor | None = None,
        dispatcher: TokenDispatcher | None = None,
        *,
        dropless: bool = False,
    ) -> tuple[Tensor, RouteStats]:
        """`[..., S, D]` → `[..., S, D]` in the same dtype, and the statistics that balance and the
        report need.

        Args:
            x: sequences of S tokens, T tokens in all; S matters to what counts by sequence alone.
            index_THK: `[T, H, K]`, replays a selection instead of choosing one.
            dispatcher: exchanges tokens with other processes (`parallel.dispatcher`). T are then
                this one's tokens, and the statistics those of the sub-tokens that were routed here.
            dropless: ignore the capacity, as decoding does.
        """
        assert dispatcher is None or index_THK is None
        x_TD, S = x.reshape(-1, x.shape[-1]), x.shape[-2] if x.dim() > 1 else 1
        if dispatcher is None:
            z_THL = self.split(x_TD)
            read = x_TD if self.reads_token else z_THL
            route = self.router(read, index_THK, seq_len=S, dropless=dropless)
            y_TD, stats = self.merge(self.experts(z_THL, route)), route.stats
            if self.shared is not None:
                y_TD = y_TD + self.shared(x_TD)
            return y_TD.view(x.shape), stats

        pieces = dispatcher.chunks(x_TD, S if self.router.counts_sequences else 1)
        chunks = [ChunkTask(self._journey(x_TD, dispatcher, S, dropless)) for x_TD in pieces]
        shared_TD = None if self.shared is None else self.shared(x_TD)  # while they travel
        parts, stats = zip(*run_interleaved(chunks), strict=True)
        y_TD = torch.cat(parts)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view(x.shape), merge_stats(stats)

    def _journey(
        self, x_TD: Tensor, dispatcher: TokenDispatcher, seq_len: int, dropless: bool
    ) -> Steps[tuple[Tensor, RouteStats]]:
        """A chunk's way through a layer that is spread over processes."""
        how = {"seq_len": seq_len, "dropless": dropless}
        early = self.router(x_TD, **how) if self.reads_token else None
        z_THL, route = yield dispatcher.scatter(self.split(x_TD), early)
        route = self.router(z_THL, **how) if route is None else route
        z_THL, there, trip = yield dispatcher.dispatch(z_THL, route, self.router.n_experts)
        y_THL = yield dispatcher.combine(self.experts(z_THL, there), trip)
        y_THL = yield dispatcher.gather(y_THL)
        return self.merge(y_THL), route.stats


class MultiHeadLatentMoE(MoE):
    """Project, split into H sub-tokens, run H independent small mixtures, concatenate, project
    back.

        [x_1 … x_H] = split(W_in x);  o = W_out · concat_h Σ_{e ∈ top-k(h)} g_e · expert_{h,e}(x_h)

    (arXiv 2602.04870 §3.) Args as in `MoE`, and:
        n_heads: H; divides d_latent.
        d_latent: D_L = H·L; 0 means d_model.
        latent_norm: learnable RMSNorm per head after W_in; norm_eps is added to its mean square.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_experts: int,
        top_k: int,
        d_expert: int,
        *,
        d_latent: int = 0,
        latent_norm: bool = True,
        norm_eps: float = 1e-6,
        activation: Activation = "swiglu",
        d_shared: int = 0,
        router: RouterConfig = RouterConfig(),
        balance: BalanceConfig = BalanceConfig(),
        capacity_factor: float = 0.0,
        recompute: bool = False,
        precision: Precision = "bfloat16",
    ):
        nn.Module.__init__(self)
        d_latent = d_latent or d_model
        if d_latent % n_heads:
            raise UsageError(
                f"n_heads={n_heads} must divide the latent width {d_latent}; "
                f"use {' or '.join(str(n) for n in _near_divisors(d_latent, n_heads))} heads"
            )
        d_head = d_latent // n_heads
        self.w_in = Linear(d_model, d_latent)
        self.norm = RMSNorm(n_heads, d_head, eps=norm_eps) if latent_norm else None
        self._build(
            d_model,
            n_heads,
            d_head,
            n_experts,
            top_k,
            d_expert,
            activation,
            d_shared,
            router,
            balance,
            capacity_factor,
            recompute,
            precision,
        )
        self.w_out = Linear(d_latent, d_model)
        init_weights(self)

    def split(self, x_TD: Tensor) -> Tensor:
        z_THL = self.w_in(x_TD).unflatten(-1, (self.n_heads, -1))
        return z_THL if self.norm is None else self.norm(z_THL)

    def merge(self, y_THL: Tensor) -> Tensor:
        return self.w_out(y_THL.flatten(1))


class LatentMoE(MultiHeadLatentMoE):
    """LatentMoE (arXiv 2601.18089): one head of width ℓ = d_latent; router and shared expert stay
    at full width D.

    The paper's sizes for a baseline of N experts, top-K and α = D/ℓ come from `latent_eff` and
    `latent_acc`.
    """

    def __init__(
        self,
        d_model: int,
        d_latent: int,
        n_experts: int,
        top_k: int,
        d_expert: int,
        *,
        latent_norm: bool = True,
        norm_eps: float = 1e-6,
        activation: Activation = "swiglu",
        d_shared: int = 0,
        router: RouterConfig = RouterConfig(reads="token"),
        balance: BalanceConfig = BalanceConfig(),
        capacity_factor: float = 0.0,
        recompute: bool = False,
        precision: Precision = "bfloat16",
    ):
        super().__init__(
            d_model,
            1,
            n_experts,
            top_k,
            d_expert,
            d_latent=d_latent,
            latent_norm=latent_norm,
            norm_eps=norm_eps,
            activation=activation,
            d_shared=d_shared,
            router=router,
            balance=balance,
            capacity_factor=capacity_factor,
            recompute=recompute,
            precision=precision,
        )


def latent_eff(n_experts: int, top_k: int, alpha: int) -> tuple[int, int]:
    """(N', K') of LatentMoE-eff: N' = αN, K' = K. The same experts' work at 1/α of the cost (arXiv
    2601.18089 eq. 1).
    """
    return alpha * n_experts, top_k


def latent_acc(
    n_experts: int, top_k: int, alpha: int, d_expert: int, d_model: int, activation: Activation
) -> tuple[int, int]:
    """(N', K') of LatentMoE-acc: N' = αN, K' = αK − the experts that pay for the two projections
    (eq. 2).

    The projections cost 2·D·ℓ multiplications per token and one expert (G+1)·ℓ·F, so ⌈2·D /
    ((G+1)·F)⌉ experts pay. The published models fit K' = αK − 2, which this gives for their sizes
    (D 4096, F 2688, two matrices).
    """
    paying = math.ceil(2 * d_model / ((n_inputs(activation) + 1) * d_expert))
    if alpha * top_k <= paying:
        raise UsageError(
            f"the projections cost as much as {paying} of the {alpha * top_k} latent experts; "
            f"raise top_k={top_k}, alpha={alpha} or d_expert={d_expert}"
        )
    return alpha * n_experts, alpha * top_k - paying


def build_moe(d_model: int, c: MoEConfig, recompute: bool = False, norm_eps: float = 1e-6) -> MoE:
    """The sparse layer that a config describes."""
    match c.kind:
        case "moe":
            return MoE(
                d_model,
                c.n_experts,
                c.top_k,
                c.d_expert,
                activation=c.activation,
                d_shared=c.d_shared,
                router=c.router,
                balance=c.balance,
                capacity_factor=c.capacity_factor,
                recompute=recompute,
                precision=c.precision,
            )
        case "latent" | "multi_head_latent":
            return MultiHeadLatentMoE(
                d_model,
                c.n_heads,
                c.n_experts,
                c.top_k,
                c.d_expert,
                d_latent=c.d_latent,
                latent_norm=c.latent_norm,
                norm_eps=norm_eps,
                activation=c.activation,
                d_shared=c.d_shared,
                router=c.router,
                balance=c.balance,
                capacity_factor=c.capacity_factor,
                recompute=recompute,
                precision=c.precision,
            )
        case _:
            raise AssertionError(f"no sparse layer of kind {c.kind!r}")


def _near_divisors(width: int, n: int) -> list[int]:
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return sorted(sorted(divisors, key=lambda d: abs(d - n))[:2])
