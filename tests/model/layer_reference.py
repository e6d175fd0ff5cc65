"""The sparse layers written as their equations: loops over tokens, heads and slots, whole float64, no shared code."""

import torch
from torch import Tensor

from headway.config import RouterConfig
from headway.model.moe import SparseLayer


def act(pre: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = pre.chunk(2)
        return gate * torch.sigmoid(gate) * up
    if activation == "swiglu_clamped":
        gate, up = pre.chunk(2)
        gate, up = (
            torch.where(gate > 7, 7, gate),
            torch.where(up > 7, 7, torch.where(up < -7, -7, up)),
        )
        return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    if activation == "relu2":
        return pre.clamp(min=0) ** 2
    return 0.5 * pre * (1 + torch.erf(pre / 2**0.5))


def choose(scores: list[float], k: int) -> list[int]:
    """The k best, ties to the lowest index."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def in_best_groups(scores: list[float], c: RouterConfig) -> list[float]:
    """The scores, −inf outside of the best groups."""
    size = len(scores) // c.n_groups
    groups = [scores[g * size : (g + 1) * size] for g in range(c.n_groups)]
    best = choose([sum(sorted(g)[-c.group_best :]) for g in groups], c.top_k_groups)
    return [s if e // size in best else float("-inf") for e, s in enumerate(scores)]


def gates(logits_E: Tensor, chosen: list[int], c: RouterConfig) -> Tensor:
    if c.gate == "topk_softmax":
        g = torch.softmax(logits_E[chosen], 0)
    elif c.gate == "softmax_topk":
        g = torch.softmax(logits_E, 0)[chosen]
    else:
        g = 1 / (1 + torch.exp(-logits_E[chosen]))
    if c.renormalize:
        g = g / g.sum()
    return g * c.scale


def layer_reference(layer: SparseLayer, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(output `[T, D]`, chosen experts `[T, H, K]`) of a layer whose parameters are float64; dropless, no noise."""
    router, experts = layer.router, layer.experts
    c = router.config
    out, picked = [], []
    for x_D in x_TD:
        z_D = x_D if layer.w_in is None else layer.w_in.weight @ x_D
        sub = list(z_D.chunk(layer.n_heads))
        if layer.norm is not None:
            sub = [
                z / torch.sqrt((z * z).mean() + layer.norm.eps) * layer.norm.weight[h]
                for h, z in enumerate(sub)
            ]
        merged, picked_H = [], []
        for h, z_L in enumerate(sub):
            logits_E = router.w_HEL[h] @ (x_D if layer.reads_token else z_L)
            if router.logit_bias_HE is not None:
                logits_E = logits_E + router.logit_bias_HE[h]
            score_E = torch.sigmoid(logits_E) if c.gate == "sigmoid" else logits_E
            biased = (score_E + router.bias_HE[h]).tolist()
            chosen = choose(in_best_groups(biased, c), router.top_k)
            g_K = gates(logits_E, chosen, c)
            y_L = torch.zeros_like(z_L)
            for slot, e in enumerate(chosen):
                pre = experts.w_in_HEGFL[h, e].flatten(0, 1) @ z_L
                if experts.b_in_HEGF is not None:
                    pre = pre + experts.b_in_HEGF[h, e].flatten()
                one_L = act(pre, experts.config.activation) @ experts.w_out_HEFL[h, e]
                if experts.b_out_HEL is not None:
                    one_L = one_L + experts.b_out_HEL[h, e]
                y_L = y_L + g_K[slot] * one_L
            merged.append(y_L)
            picked_H.append(chosen)
        y_D = torch.cat(merged)
        if layer.w_in is not None:
            y_D = layer.w_out.weight @ y_D
        if layer.shared is not None:
            pre = layer.shared.w_in.weight @ x_D
            shared_D = layer.shared.w_out.weight @ act(pre, layer.shared.activation)
            if layer.shared_gate is not None:
                shared_D = shared_D / (1 + torch.exp(-layer.shared_gate.weight[0] @ x_D))
            y_D = y_D + shared_D
        out.append(y_D)
        picked.append(picked_H)
    return torch.stack(out), torch.tensor(picked)
