"""Where and how a trained model computes, whatever it was trained with: a device, a dtype and
threads that this machine has."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from headway.config import Config, Precision, UsageError
from headway.kernels.paths import check_float8
from headway.kernels.precision import native_bfloat16

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where and how a trained model computes."""

    device: torch.device
    dtype: torch.dtype
    """Dtype of the matmuls."""
    precision: Precision
    """Precision of the experts' matmuls."""
    remarks: tuple[str, ...]
    """One sentence for each difference from training that this machine makes necessary."""


def resolve_runtime(config: Config, device: Device = "auto", dtype: Dtype = "auto") -> Runtime:
    """Choose device, dtype and expert precision for the model of a run.

    `auto` takes what the run was trained with, where this machine has it, and otherwise what it
    has, with a remark. A machine that is slow is no error here, whatever `run.strict` says. Raises
    UsageError for `device="cuda"` without a CUDA device."""
    run, moe, remarks = config.run, config.model.moe, []
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UsageError("--device cuda and this torch sees no CUDA device; use --device cpu")
    if device == "auto":
        device = run.device
        if device == "cuda" and not cuda:
            device = "cpu"
            remarks.append("trained with run.device=cuda, and this torch sees none: on the CPU")
    chosen = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    native = native_bfloat16(chosen)
    if dtype == "auto":
        dtype = run.dtype
        if dtype == "bfloat16" and not native:
            dtype = "float32"
            emulated = f"run.dtype=bfloat16, which this {chosen.type} emulates"
            remarks.append(f"trained with {emulated}: in float32")
    if dtype == "auto":
        dtype = "bfloat16" if native else "float32"
    if dtype == "float16" and chosen.type == "cpu":
        remarks.append("this CPU has no fast float16 matmuls: PyTorch's run, several times slower")
    matmuls = _DTYPES[dtype]
    precision: Precision = "bfloat16"
    if moe.kind != "dense" and moe.precision == "float8":
        try:
            width = moe.head_width(config.model.d_model)
            check_float8(chosen.type, matmuls, width, moe.d_expert, moe.activation)
            precision = "float8"
        except UsageError as error:
            why = str(error).replace("=float8 ", "=float8, which ").removesuffix("; use bfloat16")
            name = str(matmuls).removeprefix("torch.")
            remarks.append(f"trained with {why}; here the experts multiply in {name}")
    return Runtime(chosen, matmuls, precision, tuple(remarks))
