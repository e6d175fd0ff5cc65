"""Capture the kernels of a function once and replay them without the Python between: on CPUs what
CUDA graphs are on GPUs.

A decoding step of a small model is some sixty kernels of a few microseconds each, and the modules
that call them cost more than they do. `Capture` is a mode of PyTorch's dispatch that sees every C++
kernel (`CppKernels.call`) and every operator while the function runs as usual. It keeps arguments
and results, so that all addresses stay what they were:

    with Capture() as capture:          x.copy_(new)
        y = f(x)                        capture.replay()      y is f(new)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

DESCRIBES = ("device", "dtype", "layout")
"""Operators without a tensor as their result that read none of its values."""


class CannotCapture(Exception):
    """The function reads a value of a tensor."""


class Capture(TorchDispatchMode):
    """The calls of what runs under it, on CPUs, without gradient.

    Whatever the function computes from something else than tensors that are older than the capture
    is a constant of the replays; so is what `numpy` and `tolist` read, which no mode sees. Results
    are overwritten by each replay. Raises CannotCapture where an operator gives a value to Python,
    which might then go another way."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple, dict]] = []
        self._alive: list[Any] = []

    def record(self, function: Callable[..., None], args: tuple) -> None:
        """Record the call of a C++ kernel; `args` are addresses and numbers."""
        self._calls.append((function, args, {}))

    def replay(self) -> None:
        """Make all calls again, in their order, with the same addresses."""
        for function, args, kwargs in self._calls:
            function(*args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor | tuple | list):
            if name in DESCRIBES or not any(isinstance(value, Tensor) for value in args):
                return out
            raise CannotCapture(f"{func} gives the value of a tensor to Python")
        if name == "nonzero":
            raise CannotCapture(f"the shape of {func} depends on values")
        self._alive.append((args, out))
        if func._schema.is_mutable:
            self._calls.append((func, args, kwargs))
        elif not func.is_view and "empty" not in name:
            self._calls.append(_into(out, func, args, kwargs))
        return out


def capturing() -> Capture | None:
    """Return the capture that this thread runs under."""
    if torch._C._len_torch_dispatch_stack():
        mode = _get_current_dispatch_mode()
        return mode if isinstance(mode, Capture) else None
    return None


def _into(out: Any, func: Any, args: tuple, kwargs: dict) -> tuple[Callable[..., Any], tuple, dict]:
    """Return a call of an operator that writes its results where the first call left them."""
    match func:
        case torch.ops.aten.add.Tensor:  # of every residual connection
            return torch.add, args, {**kwargs, "out": out}
        case torch.ops.aten._to_copy.default:  # of every router
            return out.copy_, args, {}

    def again() -> None:
        new = func(*args, **kwargs)
        pairs = [(out, new)] if isinstance(out, Tensor) else zip(out, new, strict=True)
        for target, source in pairs:
            target.copy_(source)

    return again, (), {}
