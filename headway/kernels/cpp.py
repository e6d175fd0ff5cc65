"""The C++ kernels of `kernels/cpu`: built by the machine's own compiler when first needed, kept in
the cache, called with plain pointers.

They are faster and never different: where there is no compiler the PyTorch path of each kernel file
runs instead, and `cpp_kernels().why` says so. `HEADWAY_NATIVE=0` asks for that path.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).with_name("cpu")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w")


@dataclass(frozen=True, slots=True)  # slots: torch.compile cannot guard an instance dict
class Native:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    why: str
    """One line for people."""
    bfloat16: bool = False
    """Whether its kernels multiply bfloat16 (AVX512-BF16)."""

    def supports(self, *tensors: Tensor | None) -> bool:
        """Whether the kernels can work on these: all on the CPU, in float32, or bfloat16 where that
        is native."""
        return self.library is not None and all(
            t is None
            or (
                t.device.type == "cpu"
                and (t.dtype == torch.float32 or (t.dtype == torch.bfloat16 and self.bfloat16))
            )
            for t in tensors
        )

    def call(self, name: str, dtype: torch.dtype, *args: Tensor | int | float | None) -> None:
        """Run `headway_NAME_DTYPE(args…, threads)`. Tensors are contiguous and pass their address,
        integers are C longs, floats C floats."""
        suffix = "bfloat16" if dtype == torch.bfloat16 else "float32"
        assert self.library is not None
        function = self.library[f"headway_{name}_{suffix}"]
        function(*map(_argument, args), ctypes.c_int(torch.get_num_threads()))


@torch.compiler.assume_constant_result  # torch.compile asks once and does not look inside
def cpp_kernels() -> Native:
    """The library of this process; builds it (a few seconds) where the cache has none."""
    return _native()


@functools.cache  # apart from the function above: torch.compile would look through it, and warn
def _native() -> Native:
    if os.environ.get("HEADWAY_NATIVE", "1") == "0":
        return Native(None, "switched off by HEADWAY_NATIVE=0")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    compiler = compiler or shutil.which("clang++")
    if compiler is None:
        return Native(None, "there is no C++ compiler; install g++ or set CXX")
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
        words = str(said or error).strip().splitlines()
        return Native(None, f"{compiler} failed: {words[0] if words else error}")
    bfloat16 = bool(library.headway_has_bfloat16())
    kinds = "float32 and bfloat16" if bfloat16 else "float32"
    return Native(library, f"{kinds}, built by {Path(compiler).name} for this CPU", bfloat16)


def _built(compiler: str) -> Path:
    """The shared object for these sources, this compiler and this CPU."""
    key = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        key.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60)
    key.update(version.stdout + " ".join(FLAGS).encode() + _cpu().encode())
    root = Path(os.environ.get("HEADWAY_CACHE") or Path.home() / ".cache" / "headway").expanduser()
    target = root / "native" / f"{key.hexdigest()[:24]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            sources = sorted(map(str, SOURCES.glob("*.cpp")))
            command = [compiler, *FLAGS, *sources, "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=600)
            made.replace(target)  # another process may have been first; its file is as good
    return target


def _cpu() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features", "cpu family", "model\t")
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _argument(value: Tensor | int | float | None) -> Any:
    match value:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            assert value.is_contiguous()
            return ctypes.c_void_p(value.data_ptr())
        case int():
            return ctypes.c_long(value)
        case _:
            return ctypes.c_float(value)
