"""Which path the experts take, and why.

| path | file | runs |
|---|---|---|
| fused | gpu/experts.py, Triton | on CUDA devices, and on CPUs under Triton's interpreter |
| grouped | experts_grouped.py, `F.grouped_mm` | on CUDA devices where Triton is missing |
| cpp | experts_cpp.py, C++ | on CPUs with a compiler |
| loop | experts.py, one expert at a time | everywhere, in any dtype |
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headway.config import UsageError
from headway.kernels.cpp import cpp_kernels
from headway.kernels.gpu import SUPPORTED_DTYPES, gpu_kernels

Path = Literal["fused", "grouped", "cpp", "loop"]

WIDEST = {torch.bfloat16: 256, torch.float32: 128}
"""L up to which the fused forward pass keeps hidden units on the chip, by the dtype of x. Above,
the float32 sums of a tile leave no registers for anything else."""

GPU_ACTIVATIONS = ("swiglu", "relu2", "gelu")
"""Activations of the Triton kernels."""

MOST_GROUPS = 1023
"""Groups of one `F.grouped_mm` on a CUDA device; PyTorch refuses more."""


class ExpertInputs(NamedTuple):
    """The arguments that `forward` and `backward` of every path share; shapes as in experts.py."""

    x_NL: Tensor
    gate_NK: Tensor
    w_in_HEGFL: Tensor
    w_out_HEFL: Tensor
    slot_R: Tensor
    row_NK: Tensor
    counts_HE: Tensor
    activation: str

    def stacked_weights(self) -> tuple[Tensor, Tensor]:
        """Return w_in `[H·E, G·F, L]` and w_out `[H·E, F, L]` in x's dtype, as views if it is."""
        dtype = self.x_NL.dtype
        w_in = self.w_in_HEGFL.flatten(2, 3).flatten(0, 1).to(dtype)
        return w_in, self.w_out_HEFL.flatten(0, 1).to(dtype)


def path_of(inputs: ExpertInputs) -> Path:
    """Return the path for these tensors, from their shapes, dtypes and device."""
    x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, *_ = inputs
    if any(t.dtype not in SUPPORTED_DTYPES for t in (gate_NK, w_in_HEGFL, w_out_HEFL)):
        return "loop"
    H, E, _, F, L = w_in_HEGFL.shape
    return choose_path(x_NL.device.type, x_NL.dtype, L, F, H * E, inputs.activation)


def choose_path(
    device: str, dtype: torch.dtype, L: int, F: int, n_groups: int = 1, activation: str = "swiglu"
) -> Path:
    """Return the path for experts of width L and hidden width F with gates and weights in float32
    or bfloat16. `explain` says why.

    Every pass of every layer asks, so this compares plain values and builds no text.

    Args: device: `cuda` or `cpu`; dtype: of x; n_groups: H·E of this process."""
    in_triton = activation in GPU_ACTIVATIONS and dtype in SUPPORTED_DTYPES
    if device == gpu_kernels().device and in_triton:
        return "fused"
    if device == "cpu":
        return "cpp" if dtype in cpp_kernels().dtypes else "loop"
    aligned = dtype == torch.bfloat16 and L % 8 == 0 and F % 8 == 0
    if aligned and n_groups <= MOST_GROUPS and _has_grouped_matmuls():
        return "grouped"
    return "loop"


def explain(
    device: str, dtype: torch.dtype, L: int, F: int, n_groups: int = 1, activation: str = "swiglu"
) -> str:
    """Return one line for people on what `choose_path` chose and why."""
    match choose_path(device, dtype, L, F, n_groups, activation):
        case "fused":
            return f"Triton kernels: {gpu_kernels().why}"
        case "cpp":
            return f"C++ kernels: {cpp_kernels().why}"
        case "grouped":
            return f"grouped matmuls, sizes stay on the device; {_no_triton(dtype, activation)}"
        case "loop" if device == "cpu" and cpp_kernels().library is None:
            return f"a loop of matmuls: {cpp_kernels().why}"
        case "loop" if device == "cpu":
            return f"a loop of matmuls: the C++ kernels do not take {dtype} here"
    why = _no_triton(dtype, activation)
    fewer = choose_path(device, dtype, L, F, 1, activation)
    if n_groups > MOST_GROUPS and fewer == "grouped":
        why = f"{n_groups} experts are more than the {MOST_GROUPS} of a grouped matmul; {why}"
    return f"a loop of matmuls, sizes are read on the host, slow; {why}"


def fits_on_chip(dtype: torch.dtype, L: int, F: int) -> bool:
    """Return whether the fused forward pass keeps hidden units on the chip (gpu/experts_narrow.py).
    Those of wider experts go through memory (gpu/experts_wide.py)."""
    return L % 16 == 0 and F % 16 == 0 and WIDEST[dtype] >= L


def check_float8(
    device: str, dtype: torch.dtype, L: int, F: int, activation: str = "swiglu"
) -> None:
    """Raise UsageError where experts cannot multiply in float8."""
    if activation not in GPU_ACTIVATIONS:
        why = f"the Triton kernels have no activation {activation}"
        raise UsageError(f"precision=float8 needs the fused kernels: {why}; use bfloat16")
    if choose_path(device, dtype, L, F) != "fused":
        why = explain(device, dtype, L, F) if device == "cuda" else gpu_kernels().why
        raise UsageError(f"precision=float8 needs the fused kernels: {why}; use bfloat16")
    if dtype != torch.bfloat16:
        raise UsageError(
            f"precision=float8 needs the fused kernels: tokens are {dtype}, not bfloat16; "
            "use bfloat16"
        )
    if not fits_on_chip(dtype, L, F):
        raise UsageError(
            f"precision=float8 takes experts of width L up to {WIDEST[dtype]}, and L and F in "
            f"steps of 16, not {L} and {F}; use bfloat16"
        )
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        version = ".".join(map(str, torch.cuda.get_device_capability()))
        raise UsageError(
            f"precision=float8 needs compute capability 9.0, not {version}; use bfloat16"
        )


def _has_grouped_matmuls() -> bool:
    """Return whether `grouped_mm` is one kernel, not a loop that waits for the sizes."""
    return torch.cuda.get_device_capability()[0] in (9, 10)


def _no_triton(dtype: torch.dtype, activation: str) -> str:
    if activation not in GPU_ACTIVATIONS:
        return f"the Triton kernels have no activation {activation}"
    if dtype not in SUPPORTED_DTYPES:
        return f"the Triton kernels take bfloat16 and float32, not {dtype}"
    return f"no Triton kernels: {gpu_kernels().why}"
