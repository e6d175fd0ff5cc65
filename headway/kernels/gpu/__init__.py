"""The Triton kernels: where they run, and why not elsewhere.

They are faster and never different: without a CUDA device and Triton the other paths of each kernel
file run, and `gpu_kernels().why` says so. `HEADWAY_TRITON=0` asks for those paths, and
`HEADWAY_TRITON=interpret` for the kernels on a CPU, through Triton's interpreter: thousands of
times slower, to test or debug them. Nothing here imports Triton before a kernel is wanted."""

import contextlib
import functools
import importlib.util
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)  # slots: torch.compile cannot guard an instance dict
class GpuKernels:
    """Where the kernels run in this process, if anywhere."""

    device: str
    """`cuda`, `cpu` under the interpreter, or empty: nowhere."""
    why: str
    """One line for people."""

    def supports(self, *tensors: Tensor) -> bool:
        """Return whether the kernels work on these: on the device, in bfloat16 or float32."""
        dtypes = SUPPORTED_DTYPES
        return all(t.device.type == self.device and t.dtype in dtypes for t in tensors)


@torch.compiler.assume_constant_result  # torch.compile asks once and does not look inside
def gpu_kernels() -> GpuKernels:
    """Return where the Triton kernels run in this process."""
    return _gpu_kernels()


@functools.cache  # apart from the function above: torch.compile would look through it, and warn
def _gpu_kernels() -> GpuKernels:
    wish = os.environ.get("HEADWAY_TRITON", "1")
    if wish == "0":
        return GpuKernels("", "switched off by HEADWAY_TRITON=0")
    if importlib.util.find_spec("triton") is None:
        return GpuKernels("", "Triton is not installed: pip install 'headway[gpu]'")
    if wish == "interpret":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            return GpuKernels("", "Triton is loaded already: start Python with TRITON_INTERPRET=1")
        why = "interpreted on the CPU (HEADWAY_TRITON=interpret): for tests only"
        return GpuKernels("cpu", why)
    if not torch.cuda.is_available():
        return GpuKernels("", "there is no CUDA device")
    if torch.version.hip:
        return GpuKernels("", "never tried on AMD devices")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return GpuKernels("", f"compute capability {major}.{minor} has no bfloat16 tensor cores")
    return GpuKernels("cuda", f"compiled by Triton for compute capability {major}.{minor}")


def capability() -> int:
    """Return the current device's compute capability, 90 for 9.0; 90 where there is none."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def on(x: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the device of `x`, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
