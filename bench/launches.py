"""What the host asks of a GPU in one training step, counted without one.

    python bench/launches.py [small demo …] [--json]

A whole step (gradient, update, end of the step's sums) runs at its real sizes on the meta device:
nothing is computed, every operator and every Triton kernel is seen, and what would make the host
wait for the device is counted where it is asked for. By part of the program: launches, Triton
launches, waits, and the least time on an H100 of what was launched, from its bytes and its
products. docs/kernels.md has the table; tests/train/test_launches.py bounds it.
"""

import argparse
import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.gpu_step import draw
from headway.config import Config
from headway.data.batch import Batch
from headway.data.tokenizer import load_tokenizer
from headway.kernels import gpu
from headway.kernels.gpu import GpuKernels
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import Optimizers, build_optimizers
from headway.recipes import load
from headway.train.objective import NextToken
from headway.train.resolve import resolve
from headway.train.step import Gradient, gradient, update

BYTES_PER_S, FLOPS = 3.0e12, {torch.bfloat16: 790e12, torch.float32: 52e12}
"""Of an H100, as measured (docs/numbers/gpu_day.json)."""
WAITS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
NO_LAUNCH = ("empty", "_unsafe_view", "_reshape_alias", "detach", "lift_fresh")
"""Parts of the names of operators that allocate or describe, beside views."""


@dataclass
class Part:
    """What one part of the program asks of the device."""

    launches: int = 0
    """Operators of PyTorch that launch a kernel (or a copy)."""
    triton: int = 0
    waits: int = 0
    ms: float = 0.0
    """The least time on the device: of each launch the larger of its bytes and its products."""


class Count(TorchDispatchMode):
    """Counts by part what runs under it on the meta device. Forward and backward of attention are
    one launch and three, as those of FlashAttention are."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Part] = defaultdict(Part)
        self.names: dict[str, int] = defaultdict(int)

    @property
    def total(self) -> Part:
        """Return the sums over all parts."""
        parts = self.parts.values()
        return Part(
            *(sum(getattr(p, k) for p in parts) for k in ("launches", "triton", "waits", "ms"))
        )

    def add(self, name: str, tensors: Any, flops: float = 0.0, triton: bool = False) -> None:
        """Count one launch that reads and writes these tensors."""
        part, leaves = self.parts[_part()], [t for t in _leaves(tensors)]
        n_bytes = sum(t.numel() * t.element_size() for t in leaves)
        rate = FLOPS.get(leaves[0].dtype, FLOPS[torch.float32]) if leaves else 1.0
        part.ms += 1e3 * max(n_bytes / BYTES_PER_S, flops / rate)
        part.triton += triton
        part.launches += not triton
        self.names[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "headway":
            with self:  # what the operator launches, not the operator
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not (func.is_view or any(word in name for word in NO_LAUNCH)):
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, out_val=out, **kwargs) if formula else 0.0
            self.add(name, (args, kwargs, out), flops)
        return out


class _Waits(TorchFunctionMode):
    """Counts what reads a value of a tensor on the host; it is told that all are 1."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], self.count)
        if name in WAITS and args and isinstance(args[0], Tensor) and args[0].is_meta:
            self.count.parts[_part()].waits += 1
            ones = torch.ones(args[0].shape)
            return ones if name == "cpu" else getattr(ones, name)()
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, count):
        ctx.save_for_backward(q, k, v)
        ctx.count = count
        (B, N, S, d) = q.shape
        ctx.flops = 2 * B * N * S * S * d
        count.add("attention", (q, k, v, q), ctx.flops)
        return q.new_empty(B, S, N, d).transpose(1, 2)

    @staticmethod
    def backward(ctx, d_out):
        q, k, v = ctx.saved_tensors
        for flops in (0.0, 2.5 * ctx.flops, 0.0):
            ctx.count.add("attention backward", (q, k, v, d_out), flops)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        yield from _leaves(tuple(tree.values()))


def _part() -> str:
    """Return the file of the package that asks, the innermost of its own."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/headway/" in name:
            return name.split("/headway/")[-1].removesuffix(".py")
        frame = frame.f_back
    return "autograd"


@contextlib.contextmanager
def counting() -> Iterator[Count]:
    """Count what a GPU would be asked for by everything that runs here on the meta device: the
    kernels of GPUs are taken, and none is run."""
    import triton
    from triton.runtime.interpreter import GridExecutor

    count, there = Count(), GpuKernels("meta", "counted")

    def run(self, *args, grid=None, warmup=False, **kwargs):
        count.add(self.__name__, (args, kwargs), triton=True)

    def interpreted(self, *args, **kwargs):
        count.add(self.fn.__name__, (args, kwargs), triton=True)

    jitted = triton.runtime.jit.JITFunction
    before = jitted.run, GridExecutor.__call__, gpu._gpu_kernels
    jitted.run, GridExecutor.__call__, gpu._gpu_kernels = run, interpreted, lambda: there
    try:
        with _Waits(count), count:
            yield count
    finally:
        jitted.run, GridExecutor.__call__, gpu._gpu_kernels = before


@dataclass
class Step:
    """Model, optimisers and micro-batches of a recipe."""

    config: Config
    model: Transformer
    optimizers: Optimizers
    batch: list[Batch]

    def gradient(self) -> Gradient:
        """The first half of a step as the training loop makes it; `update` is the second."""
        return gradient(self.model, self.batch, NextToken(self.config.model.moe.balance))

    def update(self, result: Gradient) -> None:
        balance = self.config.model.moe.balance
        update(self.model, self.optimizers, result, 1.0, self.config.optim, balance)
        self.optimizers.zero_grad()

    def run(self) -> None:
        """A whole step."""
        self.update(self.gradient())


META = torch.device("meta")


def step_of(
    config: Config, dtype: torch.dtype = torch.bfloat16, device: torch.device = META
) -> Step:
    """Return the step of a config on random tokens, with a tokenizer of bytes where it names no
    vocabulary."""
    config = resolve(config, load_tokenizer(config.data.tokenizer).vocab_size).config
    with META:
        model = Transformer(config.model, Compute(dtype, config.run.recompute))
    if device.type != "meta":
        model.to_empty(device=device)
        draw(model)
    size = min(config.data.micro_batch_size, config.data.batch_size)
    batch = []
    for _ in range(config.data.batch_size // size):
        shape = (size, config.data.seq_len)
        tokens = torch.randint(256, shape, device=device)
        n_bytes = torch.ones(size, dtype=torch.float64, device=device)
        batch.append(Batch(tokens, tokens, None, n_bytes))
    return Step(config, model, build_optimizers(model, config.optim, dtype), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=["small", "demo"])
    common.add_options(parser, data=False)
    args = parser.parse_args()
    rows = []
    for name in args.recipes:
        step = step_of(load(name))
        with counting():
            step.run()  # makes the state of the optimisers
        with counting() as count:
            step.run()
        for part, n in sorted(count.parts.items(), key=lambda item: -item[1].launches):
            rows.append({"recipe": name, "part": part, **vars(n)})
        rows.append({"recipe": name, "part": "all", **vars(count.total)})
    for row in rows:
        print("{recipe:6} {part:28} {launches:7} {triton:6} {waits:3} {ms:9.2f} ms".format(**row))
    common.report("launches", rows, [], args)


if __name__ == "__main__":
    common.run(main)
