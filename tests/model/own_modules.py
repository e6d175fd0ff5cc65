"""Modules that a user might put into the slots of a model: a mixer, experts and a residual."""

import torch
from torch import nn

from headway.model.build import build_block, build_feed_forward
from headway.model.costs import Cost, CostGroup, Term
from headway.model.linear import Linear
from headway.model.moe import SparseLayer
from headway.model.residual import Residual
from headway.model.roles import Group, Init, Role, SplitOver


class RunningMean(nn.Module):
    """Each position reads the mean of the values so far, weighted by exp(−decay · distance)."""

    def __init__(self, config):
        super().__init__()
        self.value = Linear(config.d_model, config.d_model)
        self.out = Linear(config.d_model, config.d_model, ends_branch=True)
        self.decay_D = nn.Parameter(torch.empty(config.d_model))

    def roles(self):
        return {"decay_D": Role(Group.VECTOR, Init.ZEROS)}

    def forward(self, x_BSD, ctx):
        value_BSD, keep_D = self.value(x_BSD), torch.sigmoid(self.decay_D).to(x_BSD.dtype)
        state_B2D = x_BSD.new_zeros(len(x_BSD), 2, x_BSD.shape[-1])
        if ctx.cache is not None:
            state_B2D = ctx.cache.state(ctx.layer)
        sum_BD, weight_BD, outputs = *state_B2D.clone().unbind(1), []
        for v_BD in value_BSD.unbind(1):
            sum_BD, weight_BD = keep_D * sum_BD + v_BD, keep_D * weight_BD + 1
            outputs.append(sum_BD / weight_BD)
        if ctx.cache is not None:
            state_B2D.copy_(torch.stack([sum_BD, weight_BD], 1))
        return self.out(torch.stack(outputs, 1))

    def costs(self, work):
        matrices = self.value.weight.numel() + self.out.weight.numel()
        n, D = matrices + len(self.decay_D), len(self.decay_D)
        saved = Term(5 * work.n_tokens * D * work.bytes_per_value, "5·T·D·b")
        return [Cost(CostGroup.MIXER, Term(n, "2·D² + D"), Term(2 * matrices, "4·D²"), saved)]

    def init_state(self, batch, max_len, dtype, device):
        return torch.zeros(batch, 2, self.decay_D.shape[0], dtype=dtype, device=device)


class ScaledExperts(nn.Module):
    """One vector per expert in place of two matrices: y = Σ_k gate_k · (scale of e_k) ⊙ x."""

    def __init__(self, config):
        super().__init__()
        moe = config.moe
        shape = (moe.n_heads, moe.n_experts, moe.head_width(config.d_model))
        self.scale_HEL = nn.Parameter(torch.empty(shape))

    def roles(self):
        return {"scale_HEL": Role(Group.EXPERT_IN, Init.ONES, shard=SplitOver.EXPERTS)}

    def costs(self, work):
        H, E, L = self.scale_HEL.shape
        saved = Term(2 * work.n_tokens * H * L * work.bytes_per_value, "2·T·H·L·b")
        return [Cost(CostGroup.EXPERTS, Term(H * E * L, "H·E·L"), saved=saved)]

    def forward(self, x_THL, route):
        H, L = x_THL.shape[1], x_THL.shape[2]
        scale_HEL = self.scale_HEL.reshape(H, -1, L)
        n = scale_HEL.shape[1]
        padded = torch.cat([scale_HEL, scale_HEL.new_zeros(H, 1, L)], 1)
        chosen_THKL = padded[torch.arange(H).view(1, H, 1), route.index_THK.clamp(max=n)]
        y_THL = (route.gate_THK.unsqueeze(-1) * chosen_THKL).sum(2) * x_THL
        return y_THL.to(x_THL.dtype)


class TwoLanes(Residual):
    """Two lanes, mixed by learned weights (hyper-connections at their smallest)."""

    def __init__(self):
        super().__init__()
        self.read_2 = nn.Parameter(torch.empty(2))

    def roles(self):
        return {"read_2": Role(Group.VECTOR, Init.ONES)}

    def costs(self, work):
        return [Cost(CostGroup.RESIDUAL, Term(2, "lanes"))]

    def expand(self, x_BSD):
        return torch.stack([x_BSD, 0.5 * x_BSD], 2)

    def read(self, r):
        return torch.einsum("bsld,l->bsd", r, self.read_2.to(r.dtype))

    def write(self, r, y_BSD):
        return r + torch.stack([y_BSD, -0.5 * y_BSD], 2)

    def reduce(self, r):
        return r.mean(2)


def own_blocks(config, layer, compute):
    """A builder with all three, as a user writes it."""
    ffn = build_feed_forward(config, layer, compute)
    if isinstance(ffn, SparseLayer):
        experts = ScaledExperts(config)
        ffn = SparseLayer(config.d_model, config.moe, compute, experts=experts)
    return build_block(
        config, layer, compute, mixer=RunningMean(config), ffn=ffn, residual=TwoLanes
    )
