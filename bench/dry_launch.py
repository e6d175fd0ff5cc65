"""Compile Triton kernels for a GPU that is not here, exactly as they would be launched.

Inside `dry_launches(capability)` a launch compiles and returns: the host code runs on meta tensors,
no memory is touched, and every compiled kernel is recorded with its registers, spills and shared
memory. Triton brings the compiler and the assembler; only a launch needs a GPU.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headway.kernels import gpu

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as one GPU would run it."""

    name: str
    capability: int
    """90 for compute capability 9.0."""
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread that do not fit the registers; 0 is good."""
    shared: int
    """Bytes per block."""
    tensor_core: str
    """The PTX instruction that multiplies tiles (`mma`, `wgmma`, `tcgen05`), or empty."""


@contextlib.contextmanager
def dry_launches(capability: int) -> Iterator[list[Compiled]]:
    """Every launch in this context compiles for the given compute capability, at its tiles."""
    found: list[Compiled] = []
    jitted = triton.runtime.jit.JITFunction
    before = jitted.run, gpu.capability

    def run(self, *args, grid, warmup, **kwargs):
        found.append(_compile(self, args, kwargs, capability))

    jitted.run, gpu.capability = run, lambda: capability
    try:
        yield found
    finally:
        jitted.run, gpu.capability = before


def _compile(kernel: Any, args: tuple, kwargs: dict[str, Any], capability: int) -> Compiled:
    names = [p.name for p in kernel.params]
    options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in kwargs}
    values = dict(zip(names, args, strict=False)) | kwargs
    for p in kernel.params:
        if p.name not in values:
            values[p.name] = p.default
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = values[p.name]
        if p.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # what an allocator returns
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        else:
            signature[p.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(made.asm["cubin"])
    ptx = made.asm["ptx"]
    used = [name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in ptx]
    plain = {k: v for k, v in constants.items() if isinstance(v, int | float | str)}
    shape = (made.metadata.num_warps, made.metadata.num_stages)
    cores = used[0].split(".")[0] if used else ""
    shared = made.metadata.shared
    name = kernel.__name__
    return Compiled(name, capability, plain, *shape, registers, stack, shared, cores)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack of the one kernel in `cubin`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
