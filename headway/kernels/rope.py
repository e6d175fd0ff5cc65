"""Rotary position embedding (arXiv 2104.09864), half-split form as in GPT-NeoX and Hugging Face's
Llama: one pass over memory each way in `cpu/pointwise.cpp`. After an RMSNorm: norm.py.

S positions · H heads · d head width."""

import math

import torch
from torch import Tensor

from headway.config import RopeConfig
from headway.kernels.cpp import cpp_kernels, undispatched
from headway.kernels.differentiate import transformed


def rope_tables(
    positions_S: Tensor,
    d_head: int,
    theta: float,
    dtype: torch.dtype,
    config: RopeConfig = RopeConfig(),
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each `[S, 1, d_head/2]`, from float64: `rope_frequencies` times positions,
    times `config.table_factor`. `d_head` are the dims to rotate.

    `dtype` is that of the queries and keys; for bfloat16 the tables are float32, since a rounded
    table would turn by a wrong angle and change lengths."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = rope_frequencies(d_head, theta, config, positions_S.device)
    angle = torch.outer(positions_S.double(), frequency).unsqueeze(1)
    cos, sin = angle.cos(), angle.sin()
    if config.table_factor != 1.0:
        cos, sin = cos * config.table_factor, sin * config.table_factor
    return cos.to(dtype), sin.to(dtype)


def rope_rows(
    positions_S: Tensor,
    d_head: int,
    theta: float,
    dtype: torch.dtype,
    config: RopeConfig = RopeConfig(),
) -> tuple[Tensor, Tensor]:
    """Return `rope_tables` whose rows depend on nothing but their position: those are computed in
    vectors, and the last elements of a tensor by other code than the first."""
    if dtype == torch.float64 or positions_S.device.type != "cpu" or not cpp_kernels().library:
        return rope_tables(positions_S, d_head, theta, dtype, config)
    frequency = rope_frequencies(d_head, theta, config)
    cos, sin = (torch.empty(len(positions_S), 1, d_head // 2) for _ in range(2))
    sizes = (len(positions_S), d_head // 2, config.table_factor)
    cpp_kernels().call("rope_rows", torch.float32, positions_S, frequency, *sizes, cos, sin)
    return cos, sin


def rope_frequencies(
    d_head: int, theta: float, config: RopeConfig, device: torch.device | None = None
) -> Tensor:
    """Return the d_head/2 angles per position, float64: theta^(−2i/d_head), scaled as the config
    says. Equal to the `ROPE_INIT_FUNCTIONS` of Transformers, which compute in float32."""
    i = torch.arange(d_head // 2, dtype=torch.float64, device=device)
    frequency = theta ** (-2 * i / d_head)
    match config.scaling:
        case "none":
            return frequency
        case "linear":
            return frequency / config.factor
        case "llama3":
            turns = config.original_max_len * frequency / (2 * math.pi)
            low, high = config.low_freq_factor, config.high_freq_factor
            unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        case "yarn":

            def dim_of(turns: float) -> float:
                """Return the (real) dim that turns so often over the original context."""
                period = config.original_max_len / (2 * math.pi * turns)
                return d_head * math.log(period) / (2 * math.log(theta))

            first, last = dim_of(config.beta_fast), dim_of(config.beta_slow)
            if config.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, d_head - 1)
            last += 0.001 if first == last else 0  # a step
            unscaled = 1 - ((i - first) / (last - first)).clamp(0, 1)
    return frequency * (unscaled + (1 - unscaled) / config.factor)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate `x [..., S, H, d]` by tables `[S, 1, r/2]`, in plain operations; see `rope`."""
    x, passed = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    wide = x.to(cos.dtype)
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, passed), -1)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Return what `rope_reference` does, rounded once from float32. Backward rotates back.

    The first r dims of a head are rotated, dims r … d pass. Pairs are (i, i + r/2), or with
    `interleaved` (2i, 2i + 1), whose first members then come before all second ones: scores of
    queries and keys do not depend on the order of dims."""
    if transformed():
        return rope_reference(x, cos, sin, interleaved)
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rope(x[..., :width], cos, sin, interleaved), x[..., width:]), -1)
    if interleaved:
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    if cpp_kernels().supports(x, float32=(cos, sin)):
        return (_rotate_cpp if undispatched(x) else _turn)(x, cos, sin, 1.0)
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _Rope.apply(dy, cos, -sin), None, None
        return _rotate(dy, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, turn: int) -> Tensor:
    """Rotate in four passes over halves, written in place; `turn` −1 rotates back."""
    wide = x.to(cos.dtype)
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    (a, b), (out_a, out_b) = wide.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-turn)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=turn)
    return out.to(x.dtype)


def rope_sizes(x: Tensor, cos: Tensor) -> tuple[int, int, int, int]:
    """Return (rows, S, H, d/2) of `x [..., S, H, d]`."""
    S, H, d = x.shape[-3:]
    assert cos.shape == (S, 1, d // 2), "one row of the tables per position"
    return x.numel() // d, S, H, d // 2


def _rotate_cpp(x: Tensor, cos: Tensor, sin: Tensor, turn: float) -> Tensor:
    """Rotate in C++; `turn` −1 rotates back."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    cpp_kernels().call("rope", x.dtype, x, cos, sin, *rope_sizes(x, cos), turn, out)
    return out


_turn = torch.library.custom_op("headway::rope", _rotate_cpp, mutates_args=())


@_turn.register_fake
def _(x, cos, sin, turn):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_turn(ctx, inputs, output) -> None:
    _, cos, sin, ctx.turn = inputs
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx, dy):
    return _turn(dy, *ctx.saved_tensors, -ctx.turn), None, None, None


_turn.register_autograd(_turn_back, setup_context=_save_turn)
