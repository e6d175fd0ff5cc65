"""Rotary embedding and attention of a `headway` model; shapes as in modeling_headway.py."""

import math

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_headway import HeadwayConfig
from .layers_headway import RMSNorm, widen


def rope_tables(position_BS: Tensor, config, dtype: torch.dtype) -> tuple:
    """Return (cos, sin), each `[B, S, 1, r/2]`, of the r dims of a head that are rotated."""
    exact = torch.float32 if position_BS.device.type == "mps" else torch.float64
    width = config.rotary["rotary_dim"] or config.head_dim
    frequency = rope_frequencies(width, config.rope_theta, config.rotary)
    frequency = torch.tensor(frequency, dtype=exact, device=position_BS.device)
    angle = (position_BS.to(exact).unsqueeze(-1) * frequency).unsqueeze(-2)
    factor = yarn_factor(config.rotary) if config.rotary["scaling"] == "yarn" else 1.0
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rope_frequencies(width: int, theta: float, rotary: dict) -> list[float]:
    """Return the angles per position, theta^(−2i/width), scaled to longer contexts: `linear`, the
    low ones (`llama3`) or a ramp from unscaled to scaled (`yarn`, arXiv 2309.00071)."""
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    length, factor = rotary["original_max_len"], rotary["factor"]
    match rotary["scaling"]:
        case "none":
            return frequencies
        case "linear":
            return [f / factor for f in frequencies]
        case "llama3":
            low, high = rotary["low_freq_factor"], rotary["high_freq_factor"]
            unscaled = [(length * f / (2 * math.pi) - low) / (high - low) for f in frequencies]
        case "yarn":
            first, last = (
                width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))
                for turns in (rotary["beta_fast"], rotary["beta_slow"])
            )
            if rotary["truncate"]:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, width - 1)
            last += 0.001 if first == last else 0  # a step
            unscaled = [1 - (i - first) / (last - first) for i in range(width // 2)]
    shares = [min(max(share, 0.0), 1.0) for share in unscaled]
    return [f * (u + (1 - u) / factor) for f, u in zip(frequencies, shares, strict=True)]


def yarn_factor(rotary: dict) -> float:
    """Return what YaRN multiplies rotated queries and keys by."""

    def magnitude(m: float) -> float:
        return 0.1 * m * math.log(rotary["factor"]) + 1.0

    if rotary["attention_factor"]:
        return rotary["attention_factor"]
    if rotary["mscale"] and rotary["mscale_all_dim"]:
        return magnitude(rotary["mscale"]) / magnitude(rotary["mscale_all_dim"])
    return magnitude(1.0)


def rope(x: Tensor, tables: tuple, interleaved: bool) -> Tensor:
    """Rotate the first r dims of `x [B, S, heads, d]`: pairs (i, i + r/2) as in Llama, or with
    `interleaved` (2i, 2i + 1), whose first members then come before all second ones."""
    cos, sin = tables
    x, passed = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    wide = x.to(cos.dtype)
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, passed), dim=-1)


def attention_with_sinks(module, q, k, v, mask, scaling: float, **_) -> tuple[Tensor, Tensor]:
    """Return what eager attention does, where each head has one more score, its sink, which takes
    weight and gives nothing (GPT-OSS)."""
    k, v = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (k, v))
    scores_BNSK = widen(q @ k.transpose(2, 3)) * scaling + mask[..., : k.shape[-2]]
    sink = widen(module.sinks).view(-1, 1, 1).expand(*scores_BNSK.shape[:-1], 1)
    weights = torch.softmax(torch.cat((scores_BNSK, sink), dim=-1), dim=-1)[..., :-1].to(v.dtype)
    return (weights @ v).transpose(1, 2), weights


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE, optional biases, QK-norm, clamping, sliding window,
    sinks and per-head sigmoid output gate."""

    def __init__(self, config: HeadwayConfig, layer: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer, True
        widths = set(config.windows) - {0}
        if config._attn_implementation == "vllm" and (config.attention_sinks or len(widths) > 1):
            raise ValueError(
                f"vLLM computes neither attention_sinks={config.attention_sinks} nor windows of "
                f"several widths ({sorted(widths)}) of a headway model; serve it with Headway"
            )
        D, N, M = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.num_key_value_groups = config.head_dim, N // M
        self.scaling = self.head_dim**-0.5
        self.sliding_window = config.windows[layer] or None
        self.q_proj = nn.Linear(D, N * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, M * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, M * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(N * self.head_dim, D, bias=config.o_bias)
        self.q_norm, self.k_norm = _qk_norm(config, N), _qk_norm(config, M)
        self.gate = nn.Linear(D, N, bias=False) if config.attn_gate else None
        self.sinks = nn.Parameter(torch.zeros(N)) if config.attention_sinks else None

    def forward(self, x_BSD: Tensor, tables: tuple, mask, held, **kwargs) -> tuple[Tensor, Tensor]:
        """Map `[B, S, D]` to `[B, S, D]`, with the weights that an eager attention gives."""
        q, k, v = (
            proj(x_BSD).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self._rotated(q, self.q_norm, tables), self._rotated(k, self.k_norm, tables)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), self._clamped(v).transpose(1, 2)
        if held is not None:
            k, v = held.update(k, v, self.layer_idx)
        attend, name = eager_attention_forward, self.config._attn_implementation
        if self.sinks is not None:
            if name not in ("eager", "sdpa"):
                raise ValueError(f"attention sinks need attn_implementation='eager', not {name!r}")
            attend = attention_with_sinks
        elif name != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[name]
        kwargs |= {"scaling": self.scaling, "dropout": 0.0, "sliding_window": self.sliding_window}
        y_BSNd, weights = attend(self, q, k, v, mask, **kwargs)
        y_BSNd = y_BSNd.reshape(*x_BSD.shape[:2], -1, self.head_dim)
        if self.gate is not None:
            y_BSNd = y_BSNd * torch.sigmoid(self.gate(x_BSD)).unsqueeze(-1)
        return self.o_proj(y_BSNd.flatten(-2)), weights

    def _rotated(self, x: Tensor, norm: RMSNorm | None, tables: tuple) -> Tensor:
        """Norm, clamp and rotate `[B, S, heads, d]`."""
        if norm is not None:
            together = self.config.qk_norm == "all"
            x = norm(x.flatten(-2)).view(x.shape) if together else norm(x)
        return rope(self._clamped(x), tables, self.config.rotary["interleaved"])

    def _clamped(self, x: Tensor) -> Tensor:
        clip = self.config.clip_qkv
        return x.clamp(-clip, clip) if clip else x


def _qk_norm(config: HeadwayConfig, n_heads: int) -> RMSNorm | None:
    width = config.head_dim * (n_heads if config.qk_norm == "all" else 1)
    return None if config.qk_norm == "none" else RMSNorm(width, eps=config.rms_norm_eps)
