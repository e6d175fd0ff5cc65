"""The C++ kernels of `kernels/cpu`: built by the machine's own compiler when first needed, kept in
the cache, called with plain pointers.

They are faster and never different: where there is no compiler the PyTorch path of each kernel file
runs instead, and `cpp_kernels().why` says so. `HEADWAY_NATIVE=0` asks for that path."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from headway.config import cache_root
from headway.kernels.capture import capturing

SOURCES = Path(__file__).with_name("cpu")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w")


@dataclass(frozen=True, slots=True)  # slots: torch.compile cannot guard an instance dict
class CppKernels:
    """The loaded library, or why there is none."""

    library: ctypes.CDLL | None
    why: str
    """One line for people."""
    dtypes: tuple[torch.dtype, ...] = ()
    """What its kernels multiply: float32, and bfloat16 on CPUs with AVX512-BF16."""
    functions: dict[tuple[str, torch.dtype], Callable[..., None]] = field(default_factory=dict)
    """Those called so far: name and dtype → function."""

    @property
    def bfloat16(self) -> bool:
        return torch.bfloat16 in self.dtypes

    def supports(self, *tensors: Tensor, float32: Sequence[Tensor] = ()) -> bool:
        """Return whether the kernels can work on these: all on the CPU, in one of `dtypes`; those
        of `float32` in that."""
        for t in tensors:  # in loops: every operator of every layer asks
            if not t.is_cpu or t.dtype not in self.dtypes:
                return False
        for t in float32:
            if not t.is_cpu or t.dtype is not torch.float32 or not self.dtypes:
                return False
        return True

    def call(self, name: str, dtype: torch.dtype, *args: Tensor | int | float | None) -> None:
        """Run `headway_NAME_DTYPE(args…, threads)`. Tensors are contiguous and pass their address,
        integers are C longs, floats C floats."""
        function = self.functions.get((name, dtype)) or self._load(name, dtype, args)
        plain = []
        for value in args:
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                value = value.data_ptr()
            plain.append(value)
        plain.append(torch.get_num_threads())
        function(*plain)
        if capture := capturing():
            capture.record(function, tuple(plain))

    def compute(self, name: str, dtype: torch.dtype, *sizes: int) -> int:
        """Return what `headway_NAME_DTYPE(sizes…)` computes, a C long."""
        assert self.library is not None
        function = self.library[f"headway_{name}_{_suffix(dtype)}"]
        function.argtypes, function.restype = (ctypes.c_long,) * len(sizes), ctypes.c_long
        return function(*sizes)

    def _load(self, name: str, dtype: torch.dtype, args: tuple) -> Callable[..., None]:
        """Find a function and set its argument types, so that ctypes converts plain values."""
        assert self.library is not None
        function = self.functions[name, dtype] = self.library[f"headway_{name}_{_suffix(dtype)}"]
        function.argtypes, function.restype = (*map(_c_type, args), ctypes.c_int), None
        return function


def undispatched(x: Tensor) -> bool:
    """Return whether the function behind a custom operator may be called with `x` itself.

    PyTorch's dispatch of an operator written in Python costs more than the kernel does for one
    token. It is needed where something looks at operators: autograd, a compiler or tracer, a mode
    (but a capture, which sees the function itself), or a tensor that is not a plain one (fake,
    distributed)."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    plain = not torch._C._len_torch_dispatch_stack() or capturing() is not None
    return type(x) is Tensor and plain


@torch.compiler.assume_constant_result  # torch.compile asks once and does not look inside
def cpp_kernels() -> CppKernels:
    """Return the library of this process; it is built (a few seconds) where the cache has none."""
    return _cpp_kernels()


@functools.cache  # apart from the function above: torch.compile would look through it, and warn
def _cpp_kernels() -> CppKernels:
    if os.environ.get("HEADWAY_NATIVE", "1") == "0":
        return CppKernels(None, "switched off by HEADWAY_NATIVE=0")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    compiler = compiler or shutil.which("clang++")
    if compiler is None:
        return CppKernels(None, "there is no C++ compiler; install g++ or set CXX")
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
        words = str(said or error).strip().splitlines()
        return CppKernels(None, f"{compiler} failed: {words[0] if words else error}")
    dtypes, names = (torch.float32,), "float32"
    if library.headway_has_bfloat16():
        dtypes, names = (torch.float32, torch.bfloat16), "float32 and bfloat16"
    return CppKernels(library, f"{names}, built by {Path(compiler).name} for this CPU", dtypes)


def _built(compiler: str) -> Path:
    """Return the shared object for these sources, compiler and CPU, built if the cache has none."""
    key = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        key.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60)
    key.update(version.stdout + " ".join(FLAGS).encode() + _cpu().encode())
    target = cache_root() / "native" / f"{key.hexdigest()[:24]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            sources = sorted(map(str, SOURCES.glob("*.cpp")))
            command = [compiler, *FLAGS, *sources, "-o", str(built)]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=600)
            built.replace(target)  # another process may have been first; its file is as good
    return target


def _cpu() -> str:
    """Return the CPU's model and feature flags, on which `-march=native` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features", "cpu family", "model\t")
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _suffix(dtype: torch.dtype) -> str:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _c_type(value: Tensor | int | float | None) -> type:
    match value:
        case int():
            return ctypes.c_long
        case float():
            return ctypes.c_float
        case _:
            return ctypes.c_void_p
