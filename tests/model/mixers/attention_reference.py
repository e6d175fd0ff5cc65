"""Attention written as its equations, from the weights of a layer: no code shared with it."""

import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.model.mixers.attention import Attention


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotated(x: Tensor, config: ModelConfig) -> Tensor:
    """`[B, S, heads, d]`, the pairs of each head turned by position times frequency."""
    d = x.shape[-1]
    out = x.clone()
    for t in range(x.shape[1]):
        for i in range(d // 2):
            angle = torch.tensor(t * config.rope_theta ** (-2 * i / d), dtype=x.dtype)
            a, b = x[:, t, :, i], x[:, t, :, i + d // 2]
            out[:, t, :, i] = a * torch.cos(angle) - b * torch.sin(angle)
            out[:, t, :, i + d // 2] = b * torch.cos(angle) + a * torch.sin(angle)
    return out


def projected(layer: Attention, x: Tensor, config: ModelConfig) -> list[Tensor]:
    """Queries, keys and values `[B, S, heads, d]`."""
    parts = []
    for linear, norm, n in (
        (layer.q, layer.q_norm, config.n_heads),
        (layer.k, layer.k_norm, config.kv_heads),
        (layer.v, None, config.kv_heads),
    ):
        y = x @ linear.weight.T
        if linear.bias is not None:
            y = y + linear.bias
        if norm is not None and config.qk_norm == "all":
            y = normed(y, norm.weight, config.norm_eps)
        y = y.unflatten(-1, (n, -1))
        if norm is not None and config.qk_norm == "head":
            y = normed(y, norm.weight, config.norm_eps)
        if config.clip_qkv:
            y = torch.minimum(
                torch.maximum(y, torch.tensor(-config.clip_qkv)), torch.tensor(config.clip_qkv)
            )
        parts.append(y if linear is layer.v else rotated(y, config))
    return parts


def attention_reference(
    layer: Attention, x: Tensor, mask_SS: Tensor, config: ModelConfig
) -> Tensor:
    """Output `[B, S, D]` of one query at a time; `mask_SS` is true where a query sees a key."""
    q, k, v = projected(layer, x, config)
    repeat = config.n_heads // config.kv_heads
    heads = []
    for n in range(config.n_heads):
        key, value = k[:, :, n // repeat], v[:, :, n // repeat]
        score = q[:, :, n] @ key.transpose(1, 2) / key.shape[-1] ** 0.5
        weight = torch.exp(score - score.max()) * mask_SS
        y = weight @ value / weight.sum(-1, keepdim=True)
        if layer.gate is not None:
            y = y * torch.sigmoid(x @ layer.gate.weight[n]).unsqueeze(-1)
        heads.append(y)
    y = torch.cat(heads, -1) @ layer.o.weight.T
    return y if layer.o.bias is None else y + layer.o.bias
