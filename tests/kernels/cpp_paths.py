"""What every test of a C++ kernel needs: the PyTorch path beside it, and another thread count."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from headway.kernels.cpp import CppKernels, cpp_kernels

needs_native = pytest.mark.skipif(cpp_kernels().library is None, reason=cpp_kernels().why)
NATIVE_DTYPES = [torch.float32, *([torch.bfloat16] if cpp_kernels().bfloat16 else [])]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
"""Of results in this dtype. A rounding to bfloat16 is off by up to 2⁻⁸ of a power of two, 1.7e-3 of
the value rms over many values; everything before it is float32."""


def switch_off(monkeypatch: pytest.MonkeyPatch, module) -> None:
    """Makes a kernel file run its PyTorch path."""
    monkeypatch.setattr(module, "cpp_kernels", lambda: CppKernels(None, "switched off by a test"))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Runs with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
