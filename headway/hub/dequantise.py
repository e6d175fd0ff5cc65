"""Weights that are published in 8 or 4 bits, as bfloat16: what Transformers gives with
`dequantize=True`.

FP8 (DeepSeek-V3, arXiv 2412.19437 §3.3): e4m3 values `X` with a float32 scale for each block of
128 × 128 in `X_scale_inv`. MXFP4 (GPT-OSS; the OCP's microscaling formats): in
`X_blocks [E, out, B, 16]` two e2m1 values a byte, low half first, with an exponent of 2, biased by
127, for each block of 32 inputs in `X_scales [E, out, B]`; the matrix they stand for is
`X [E, in, out]`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from headway.config import UsageError
from headway.hub.layout import Region, Shape

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of 4 bits."""


class Reader(Protocol):
    """Tensors on disk, by name."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, slices: Region = (), dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor, or the part that `slices` select, in `dtype`."""
        ...

    def __exit__(self, *_: object) -> None: ...


def dequantised(reader: Reader, config: dict[str, Any] | None) -> Reader:
    """Return a reader of the weights that a folder stands for; `config` is its
    `quantization_config`. Raises UsageError for a form that is not known."""
    match (config or {}).get("quant_method"):
        case None:
            return reader
        case "fp8":
            return Float8(reader, (config or {}).get("weight_block_size") or (128, 128))
        case "mxfp4":
            return MXFP4(reader)
        case method:
            raise UsageError(
                f"config.json has quant_method={method}, and only fp8 and mxfp4 are known; save "
                "the model in bfloat16"
            )


class Float8:
    """Matrices in e4m3 with scales by block; other tensors as they are.

    Raises: UsageError for a matrix without its scales, or scales of another size."""

    def __init__(self, reader: Reader, block: Sequence[int]) -> None:
        self._reader, (self._rows, self._columns) = reader, block
        present = set(reader.names())
        narrow = {n for n in present if reader.dtype(n) in (torch.float8_e4m3fn, torch.float8_e5m2)}
        self._scales = {name: f"{name}_scale_inv" for name in narrow}
        if without := sorted(n for n, scale in self._scales.items() if scale not in present):
            raise UsageError(
                f"{without[0]} is stored in FP8 and has no {self._scales[without[0]]} "
                f"({len(without)} such tensors)"
            )
        for name, scale in self._scales.items():
            rows, columns = reader.shape(name)
            wanted = -(-rows // self._rows), -(-columns // self._columns)
            if reader.shape(scale) != wanted:
                raise UsageError(
                    f"{scale} has the shape {list(reader.shape(scale))}, and {name} needs "
                    f"{list(wanted)} for blocks of {self._rows} × {self._columns}"
                )

    def names(self) -> Sequence[str]:
        scales = set(self._scales.values())
        return [name for name in self._reader.names() if name not in scales]

    def shape(self, name: str) -> Shape:
        return self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._scales else self._reader.dtype(name)

    def read(self, name: str, slices: Region = (), dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._scales:
            return self._reader.read(name, slices, dtype)
        narrow, scales = self._reader.read(name), self._reader.read(self._scales[name])
        values = torch.empty(narrow.shape, dtype=torch.bfloat16)
        scales = scales.float().repeat_interleave(self._columns, 1)[:, : narrow.shape[1]]
        strips = zip(narrow.split(self._rows), values.split(self._rows), scales, strict=True)
        for strip, out, scale in strips:  # in float32, rounded once
            out.copy_(strip.float() * scale)
        return values[slices].to(dtype or torch.bfloat16)

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)


class MXFP4:
    """Stacks of experts in e2m1 with exponents by block; other tensors as they are.

    Raises: UsageError for blocks without their scales, or scales of another size."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        present = set(reader.names())
        self._stacks = {n.removesuffix("_blocks") for n in present if n.endswith("_blocks")}
        for name in sorted(self._stacks):
            if f"{name}_scales" not in present:
                raise UsageError(f"{name}_blocks is stored in MXFP4 and has no {name}_scales")
            blocks, scales = reader.shape(f"{name}_blocks"), reader.shape(f"{name}_scales")
            if len(blocks) != 4 or blocks[:3] != scales or blocks[3] != 16:
                raise UsageError(
                    f"{name}_scales has the shape {list(scales)}, and {name}_blocks "
                    f"{list(blocks)}; they must be [E, out, B] and [E, out, B, 16]"
                )

    def names(self) -> Sequence[str]:
        inside = {f"{name}_{part}" for name in self._stacks for part in ("blocks", "scales")}
        return [*(n for n in self._reader.names() if n not in inside), *sorted(self._stacks)]

    def shape(self, name: str) -> Shape:
        if name not in self._stacks:
            return self._reader.shape(name)
        E, n_out, n_blocks, n_bytes = self._reader.shape(f"{name}_blocks")
        return (E, n_blocks * n_bytes * 2, n_out)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._stacks else self._reader.dtype(name)

    def read(self, name: str, slices: Region = (), dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._stacks:
            return self._reader.read(name, slices, dtype)
        experts, rest = slices[:1], slices[1:]
        packed = self._reader.read(f"{name}_blocks", experts)
        exponents = self._reader.read(f"{name}_scales", experts).int().sub_(127)
        table = torch.tensor(_E2M1, dtype=torch.bfloat16)
        values = torch.empty(*packed.shape[:3], 32, dtype=torch.bfloat16)
        values[..., ::2] = table[(packed & 15).int()]
        values[..., 1::2] = table[(packed >> 4).int()]
        values = torch.ldexp(values, exponents.unsqueeze(-1)).to(torch.bfloat16)
        whole = values.flatten(2).transpose(1, 2)
        return whole[(slice(None), *rest)].to(dtype or torch.bfloat16)

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)
