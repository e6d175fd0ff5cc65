"""Attention written as its equations, from the weights of a layer: no code shared with it."""

import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.kernels.rope import rope_frequencies
from headway.model.mixers.attention import Attention


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotated(x: Tensor, config: ModelConfig) -> Tensor:
    """`[B, S, heads, d]`, each pair of dims turned by position times frequency where it stands."""
    width, scale = config.rotary_width, config.rope.table_factor
    frequency = rope_frequencies(width, config.rope_theta, config.rope)
    out = x.clone()
    for t in range(x.shape[1]):
        for i in range(width // 2):
            j, k = (2 * i, 2 * i + 1) if config.rope.interleaved else (i, i + width // 2)
            cos, sin = torch.cos(t * frequency[i]), torch.sin(t * frequency[i])
            a, b = scale * x[:, t, :, j], scale * x[:, t, :, k]
            out[:, t, :, j], out[:, t, :, k] = a * cos - b * sin, b * cos + a * sin
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
        total = weight.sum(-1, keepdim=True)
        if layer.sinks_N is not None:
            total = total + torch.exp(layer.sinks_N[n] - score.max())
        y = weight @ value / total
        if layer.gate is not None:
            y = y * torch.sigmoid(x @ layer.gate.weight[n]).unsqueeze(-1)
        heads.append(y)
    y = torch.cat(heads, -1) @ layer.o.weight.T
    return y if layer.o.bias is None else y + layer.o.bias
