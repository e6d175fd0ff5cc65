"""A sparse layer: split, router, experts, merge.

T tokens · D model width · H heads · L width of one head · E experts per head · K chosen · F expert
hidden width · G = 2 for SwiGLU (gate, then up), else 1. One forward pass serves a flat MoE,
LatentMoE and Multi-Head LatentMoE, in one process and on a mesh; they differ in how a token is
split before routing and merged after it (`model.layers`)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from headway.config import MoEConfig, UsageError
from headway.config.bounds import nearest_divisors
from headway.kernels.activation import gate_heads
from headway.kernels.experts import experts
from headway.kernels.packed import batch_invariant
from headway.kernels.packed_experts import PackedExperts, pack_experts, packed_experts
from headway.kernels.permute import sort_rows
from headway.model.balance import RouteReport, RouteStats, merge_stats
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.costs import Cost, CostGroup, Term, Workload, casts, costs_of
from headway.model.dispatch import ChunkTask, Finished, Steps, run_interleaved
from headway.model.linear import FeedForward, Linear, RMSNorm
from headway.model.packing import shape_only
from headway.model.roles import Group, Init, Role, SplitOver, StoresByRole
from headway.model.router import Route, Router, replayed


class Experts(StoresByRole):
    """y = Σ_k gate_k · (w_out[e_k]ᵀ act(w_in[e_k]·x + b_in[e_k]) + b_out[e_k]).

    The weights of all heads and experts of a layer are two parameters, their biases, with
    `expert_bias`, two more. Expert (h, e) is `w_in_HEGFL[h, e]` and `w_out_HEFL[h, e]`: its global
    name, whatever the mesh."""

    def __init__(self, d_model: int, config: MoEConfig, compute: Compute = Compute()):
        super().__init__()
        self.config, self.compute = config, compute
        H, E, F, L = config.n_heads, config.n_experts, config.d_expert, config.head_width(d_model)
        self.w_in_HEGFL = nn.Parameter(torch.empty(H, E, config.n_inputs, F, L))
        self.w_out_HEFL = nn.Parameter(torch.empty(H, E, F, L))
        biased = config.expert_bias
        self.b_in_HEGF = nn.Parameter(torch.empty(H, E, config.n_inputs, F)) if biased else None
        self.b_out_HEL = nn.Parameter(torch.empty(H, E, L)) if biased else None
        self.packed: PackedExperts | None = None

    def roles(self) -> dict[str, Role]:
        F, L = self.w_out_HEFL.shape[-2:]
        # where there is an output projection it follows and ends the branch
        ends = not self.config.projects
        bias = Role(Group.VECTOR, Init.ZEROS, shard=SplitOver.EXPERTS)
        return {
            "b_in_HEGF": bias,
            "b_out_HEL": bias,
            "w_in_HEGFL": Role(Group.EXPERT_IN, fan_in=L, shard=SplitOver.EXPERTS),
            "w_out_HEFL": Role(
                Group.EXPERT_OUT, fan_in=F, ends_branch=ends, shard=SplitOver.EXPERTS
            ),
        }

    def pack(self, dtype: torch.dtype) -> None:
        """Pack the experts where there is a kernel for that; else keep them in `dtype`."""
        w_in, w_out = self.w_in_HEGFL, self.w_out_HEFL
        if w_in.is_meta:
            return
        if batch_invariant(w_in.device, dtype):
            bias = self.b_in_HEGF
            if bias is not None and not torch.equal(bias.to(w_in.dtype).to(bias.dtype), bias):
                w_in, w_out = w_in.to(dtype), w_out.to(dtype)  # narrower weights would round it
            weights = self._with_bias(w_in.detach(), w_out.detach())
            self.packed = pack_experts(*weights, self.config.activation, dtype)
            self.w_in_HEGFL, self.w_out_HEFL = shape_only(w_in), shape_only(w_out)
        else:
            self.requires_grad_(False).to(dtype)

    def forward(self, x_THL: Tensor, route: Route) -> Tensor:
        """Map `[T, H, L]` to `[T, H, L]` in x's dtype.

        Or `[T, 1, L]` where each sub-token has a head of its own (Expert Parallel): the indices
        then count all H·E experts, expert e of head h being h·E + e."""
        H, L = x_THL.shape[1:]
        if self.b_in_HEGF is not None:  # what the columns of `_with_bias` multiply
            x_THL = pad(x_THL, (0, self._more), value=1.0)
        if self.packed is not None:
            y_THL = packed_experts(x_THL, route.gate_THK, route.index_THK, self.packed)[..., :L]
            return y_THL if self.b_out_HEL is None else self._add_output_bias(y_THL, route)
        weights = self._with_bias(self.w_in_HEGFL, self.w_out_HEFL)
        w_in, w_out = (w.view(H, -1, *w.shape[2:]) for w in weights)
        y_NL = experts(
            x_THL.flatten(0, 1),
            route.gate_THK.flatten(0, 1),
            sort_rows(route.index_THK, w_in.shape[1]),
            w_in,
            w_out,
            self.config.activation,
            self.compute.recompute,
            self.config.precision,
        )
        y_THL = y_NL.view(x_THL.shape)[..., :L]
        if self.b_out_HEL is None:
            return y_THL
        gate_THE = _dense_gates(route, w_in.shape[1])
        bias_HEL = self.b_out_HEL.view(H, -1, L).to(gate_THE.dtype)
        return y_THL + torch.einsum("the,hel->thl", gate_THE, bias_HEL).to(y_THL.dtype)

    @property
    def _more(self) -> int:
        """Columns that biases add to the width of an expert, aligned for the kernels of GPUs."""
        return 16 if self.w_in_HEGFL.is_cuda else 1

    def _with_bias(self, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights with a column of biases, for inputs that end in ones: so every kernel
        and every gradient serves. The columns of the result beyond L mean nothing."""
        if self.b_in_HEGF is None:
            return w_in, w_out
        bias = pad(self.b_in_HEGF.unsqueeze(-1).to(w_in.dtype), (0, self._more - 1))
        return torch.cat((w_in, bias), -1), pad(w_out, (0, self._more))

    def _add_output_bias(self, y_THL: Tensor, route: Route) -> Tensor:
        """Add Σ_k gate_k · b_out[e_k] slot by slot, so that rows do not depend on each other."""
        assert self.b_out_HEL is not None
        H, L = y_THL.shape[1:]
        bias_HEL = pad(self.b_out_HEL.view(H, -1, L), (0, 0, 0, 1))  # no expert, no bias
        head_H = torch.arange(H, device=y_THL.device)
        wide = y_THL.to(bias_HEL.dtype)
        for k in range(route.index_THK.shape[-1]):
            bias_THL = bias_HEL[head_H, route.index_THK[..., k].long()]
            wide = wide + route.gate_THK[..., k, None] * bias_THL
        return wide.to(y_THL.dtype)

    def costs(self, work: Workload) -> Sequence[Cost]:
        """Saved are the tables of R = T·H·K permuted tokens and, without `recompute`, their
        pre-activations."""
        H, E, G, F, L = self.w_in_HEGFL.shape
        K, rows = self.config.top_k, work.n_tokens * H * self.config.top_k
        each = H * (G + 1) * F * L
        saved = 0 if self.compute.recompute else rows * G * F * work.bytes_per_value
        biases = Cost(CostGroup.EXPERTS)
        if self.b_in_HEGF is not None:
            T, n, ends = work.n_tokens, H * (G * F + L), H * (G + 1) * F
            copies = 4 * E * ends * (L + 1) + T * (4 * H * E + H * (L + 1) * work.bytes_per_value)
            biases = Cost(
                CostGroup.EXPERTS,
                Term(E * n, "E·(H·G·F + D_L)"),
                Term(2 * K * ends + 2 * E * H * L, "2·K·H·(G+1)·F + 2·E·D_L"),
                Term(copies, "4·E·(G+1)·F·(D_L + H) + 4·T·H·E + T·(D_L + H)·b"),
                Term(K * n, "K·(H·G·F + D_L)"),
            )
        return (
            biases,
            Cost(
                CostGroup.EXPERTS,
                Term(E * each, "E·(G+1)·F·D_L"),
                Term(2 * K * each, "2·K·(G+1)·F·D_L"),
                Term(saved, "R·G·F·b"),
                Term(K * each, "K·(G+1)·F·D_L"),
            ),
            Cost(CostGroup.PERMUTATION, saved=Term(16 * rows, "16·R, R = T·H·K")),
        )


def _dense_gates(route: Route, n_experts: int) -> Tensor:
    """Return the gate of every expert, `[T, H, E]`; 0 where it was not chosen."""
    gate_THK = route.gate_THK
    gate_THE = gate_THK.new_zeros(*gate_THK.shape[:2], n_experts + 1)
    return gate_THE.scatter_add(-1, route.index_THK.long(), gate_THK)[..., :n_experts]


class SparseLayer(nn.Module):
    """The sparse layer that a `MoEConfig` describes.

    Args:
        d_model: D.
        config: heads, experts, router, balance.
        compute: what is kept for backward.
        norm_eps: added to the mean square of the latent RMSNorm.
        experts: a module of your own, `(z [T, H, L], Route) → [T, H, L]`; None: `Experts`.
    Raises: UsageError where the sizes do not fit; in `forward`, where float8 cannot run.

    Matrices may be stored in float32, bfloat16 or float16 (`layer.bfloat16()`); routers, norms,
    biases, scores and gates stay float32. Matmuls run in the dtype of x."""

    def __init__(
        self,
        d_model: int,
        config: MoEConfig,
        compute: Compute = Compute(),
        *,
        norm_eps: float = 1e-6,
        experts: nn.Module | None = None,
    ):
        super().__init__()
        self.config, self.n_heads, self.reads_token = config, config.n_heads, config.reads_token
        d_latent, projects = config.latent_width(d_model), config.projects
        if d_latent % config.n_heads:
            raise UsageError(
                f"n_heads={config.n_heads} must divide the latent width {d_latent}; "
                f"use {nearest_divisors(d_latent, config.n_heads)} heads"
            )
        self.w_in = Linear(d_model, d_latent) if projects else None
        norm = RMSNorm(config.n_heads, d_latent // config.n_heads, eps=norm_eps)
        self.norm = norm if config.is_latent and config.latent_norm else None
        self.router = Router(d_model, config, compute)
        self.experts = Experts(d_model, config, compute) if experts is None else experts
        shared = config.d_shared
        self.shared = FeedForward(d_model, shared, config.activation) if shared else None
        self.shared_gate = Linear(d_model, 1) if config.shared_gate else None
        self.w_out = Linear(d_latent, d_model, ends_branch=True) if projects else None

    def split(self, x_TD: Tensor) -> Tensor:
        """Map `[T, D]` to sub-tokens `[T, H, L]`; in a flat MoE the token itself, H = 1."""
        z_TL = x_TD if self.w_in is None else self.w_in(x_TD)
        z_THL = z_TL.unflatten(-1, (self.n_heads, -1))
        return z_THL if self.norm is None else self.norm(z_THL)

    def merge(self, y_THL: Tensor) -> Tensor:
        """Map `[T, H, L]` to `[T, D]`."""
        return y_THL.flatten(1) if self.w_out is None else self.w_out(y_THL.flatten(1))

    def forward(self, x: Tensor, ctx: Context = Context()) -> tuple[Tensor, RouteStats]:
        """Map `[..., S, D]` to `[..., S, D]` in the same dtype, and the statistics that balance and
        the report need.

        `x` holds sequences of S tokens, T tokens in all; S matters to what counts by sequence
        alone. On a mesh T are this process's tokens, and the statistics those of the sub-tokens
        that were routed here."""
        x_TD, S = x.reshape(-1, x.shape[-1]), x.shape[-2] if x.dim() > 1 else 1
        chunks = ctx.dispatcher.chunks(x_TD, S if self.router.counts_sequences else 1)
        replay: Sequence[Tensor | None] = [None] * len(chunks)
        if ctx.replay:
            replay = ctx.replay[ctx.sparse_layer].split([len(chunk) for chunk in chunks])
        tasks = [
            ChunkTask(self._steps(chunk_TD, index_THK, S, ctx)).start()
            for chunk_TD, index_THK in zip(chunks, replay, strict=True)
        ]
        # computed while the chunks are exchanged
        shared_TD = self._shared(x_TD)
        parts, stats = zip(*run_interleaved(tasks), strict=True)
        y_TD = parts[0] if len(parts) == 1 else torch.cat(parts)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view(x.shape), merge_stats(stats)

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        """Return the output of the shared expert, if there is one."""
        if self.shared is None:
            return None
        y_TD = self.shared(x_TD)[0]
        if self.shared_gate is None:
            return y_TD
        return gate_heads(y_TD.unsqueeze(1), self.shared_gate(x_TD)).squeeze(1)

    def _steps(self, x_TD: Tensor, index_THK: Tensor | None, seq_len: int, ctx: Context) -> Steps:
        """Compute one chunk, from exchange to exchange."""
        dispatcher, router, E = ctx.dispatcher, self.router, self.config.n_experts
        how = (seq_len, ctx.cache is not None, ctx.report)
        z_THL = self.split(x_TD)
        early = given = None
        if self.reads_token:  # before the exchange: indices and gates are sent along
            early = given = router(x_TD, index_THK, *how)
        elif index_THK is not None:
            given = replayed(index_THK, router)
        z_THL, given = yield dispatcher.scatter(z_THL, given)
        route: Route = given
        if early is None:
            route = router(z_THL, None if given is None else given.index_THK, *how)
        chosen = route
        if router.n_zero:
            chosen = route._replace(index_THK=route.index_THK.clamp(max=E))
        z_THL, there, metadata = yield dispatcher.dispatch(z_THL, chosen, E)
        y_THL = yield dispatcher.combine(self.experts(z_THL, there), metadata)
        y_THL = yield dispatcher.gather(y_THL)
        stats = route.stats
        if ctx.report:
            norm_TH = y_THL.detach().float().norm(dim=-1) if "norms" in ctx.report else None
            if early is not None:  # of this process's tokens already
                parts = [early.chosen_THK, early.gate_THK.detach(), early.logits_THE]
            else:
                parts = [route.chosen_THK, route.gate_THK.detach(), route.logits_THE]
                for i, part in enumerate(parts):
                    if part is not None:
                        parts[i] = yield dispatcher.gather(part, exact=True)
            stats = stats._replace(report=RouteReport(*parts, norm_TH))  # type: ignore[arg-type]
        yield Finished((self.merge(y_THL), stats))

    def costs(self, work: Workload) -> Sequence[Cost]:
        """Saved by the projections are the sub-tokens, before and after their norm, and the outputs
        of the experts; a flat MoE reads the output of the block's norm."""
        costs = [*costs_of(self.router, work), *costs_of(self.experts, work)]
        if self.shared is not None:
            costs += self.shared.costs(work, CostGroup.SHARED)
        T, b, H = work.n_tokens, work.bytes_per_value, self.n_heads
        if self.shared_gate is not None:
            D = self.shared_gate.weight.shape[1]
            saved = Term(T * (D + 1) * b, "T·(D + 1)·b")
            costs.append(Cost(CostGroup.SHARED, Term(D, "D"), Term(2 * D, "2·D"), saved))
            costs.append(casts(D, work))
        saved = 0
        if self.norm is not None:
            D_L = self.norm.weight.numel()
            saved += T * (D_L * b + 4 * H)
            costs.append(Cost(CostGroup.NORMS, Term(D_L, "D_L")))
        if self.w_in is not None:
            D_L, D = self.w_in.weight.shape
            saved += 2 * T * D_L * b
            weights, flops = Term(2 * D * D_L, "2·D·D_L"), Term(4 * D * D_L, "4·D·D_L")
            costs += [Cost(CostGroup.LATENT, weights, flops), casts(2 * D * D_L, work)]
        if saved:
            costs.append(Cost(CostGroup.SUB_TOKENS, saved=Term(saved, "2·T·D_L·b")))
        return costs
