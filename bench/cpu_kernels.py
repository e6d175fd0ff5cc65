"""The C++ kernels beside PyTorch's path of the same file, and beside the ceiling of this machine.

    python bench/cpu_kernels.py [--repetitions 15] [--threads N] [--json] [--save]

Experts with 2,048 tokens, 32 experts per head, top-4, F 192, at 1 × 384, 6 × 64 and 12 × 32 heads;
causal attention, RMSNorm, QK-norm with RoPE and SwiGLU at the shapes of bench/cpu_step.py;
attention to a window and to documents, on PyTorch's path with a dense mask. Both
sides take turns, a call each; a row holds medians of forward with backward. The ceiling is the best
rate of a large square matmul of PyTorch in the same dtype; work of the products alone is counted.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.cpu_step import matmul_peak
from headway.config import UsageError
from headway.kernels import activation, attention, experts, norm, paths, rope
from headway.kernels.cpp import CppKernels, cpp_kernels
from headway.kernels.permute import sort_rows
from headway.model.context import Positions
from headway.train.allocator import set_allocator

MODULES = (activation, attention, norm, paths, rope)
Case = tuple[Callable[..., Tensor], list[Tensor], float]
"""A function, its arguments (all take gradients), and the operations of its forward products."""


@contextmanager
def pytorch_paths() -> Iterator[None]:
    """The kernel files take their PyTorch path."""
    for module in MODULES:
        module.cpp_kernels = lambda: CppKernels(None, "the baseline's turn")  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in MODULES:
            module.cpp_kernels = cpp_kernels  # type: ignore[attr-defined]


def cases(dtype: torch.dtype, tokens: int) -> dict[str, Case]:
    """What is timed, by name."""
    made: dict[str, Case] = {}
    for H, L in ((1, 384), (6, 64), (12, 32)):
        made[f"experts {H}x{L}"] = _experts(dtype, tokens, H, L)
    B, N, S, d = max(1, tokens // 256), 6, min(256, tokens), 64
    q, k, v = (torch.randn(B, S, N, d).to(dtype) for _ in range(3))
    causal = 4 * B * N * d * S * (S + 1) / 2
    made["attention 6x64, S 256"] = (attention.attention, [q, k, v], causal)
    for name, window, document in (("window 64", 64, 0), ("documents of 128", 0, 128)):
        made[f"attention 6x64, S 1024, {name}"] = _bounded(dtype, tokens, window, document)
    x, w = torch.randn(tokens, 384).to(dtype), torch.ones(384)
    made["RMSNorm 384"] = (lambda x, w: norm.rms_norm(x, w, 1e-6), [x, w], 0.0)
    tables = rope.rope_tables(torch.arange(S), d, 1e4, dtype)
    made["QK-norm and RoPE 6x64"] = (
        lambda q, w: norm.norm_rope(q, w, 1e-6, *tables),
        [q.clone(), torch.ones(d)],
        0.0,
    )
    pre = torch.randn(tokens, 2 * 1024).to(dtype)
    made["SwiGLU 1024"] = (lambda pre: activation.activate(pre, "swiglu"), [pre], 0.0)
    return made


def _bounded(dtype: torch.dtype, tokens: int, window: int, document: int) -> Case:
    """Attention with a window or documents: the kernel reads first keys, PyTorch a dense mask."""
    B, N, S, d = max(1, tokens // 1024), 6, min(1024, tokens), 64
    doc_BS = (torch.arange(S) // document).int().expand(B, S) if document else None
    positions = Positions(B, S, torch.device("cpu"), doc_BS=doc_BS)
    mask, _ = positions.visible(window, torch.float64)
    _, first_BS = positions.visible(window, dtype)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if attention.reads_first(q.device, q.dtype):
            return attention.attention(q, k, v, first_BS=first_BS)
        return attention.attention(q, k, v, mask)

    seen = B * S * (S + 1) / 2 if mask is None else mask.expand(B, 1, S, S).sum().item()
    return call, [torch.randn(B, S, N, d).to(dtype) for _ in range(3)], 4.0 * N * d * seen


def _experts(dtype: torch.dtype, tokens: int, H: int, L: int) -> Case:
    E, K, Fh = 32, 4, 192
    rows = sort_rows(torch.rand(tokens, H, E).argsort(-1)[..., :K], E)
    arguments = [
        torch.randn(tokens * H, L).to(dtype),
        torch.rand(tokens * H, K),
        torch.randn(H, E, 2, Fh, L) / L**0.5,
        torch.randn(H, E, Fh, L) / Fh**0.5,
    ]

    def call(x: Tensor, gate: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return experts.experts(x, gate, rows, w_in, w_out, "swiglu")

    return call, arguments, 6.0 * tokens * H * K * L * Fh


def seconds(case: Case) -> dict:
    """One forward and backward."""
    call, arguments, _ = case
    inputs = [t.detach().requires_grad_() for t in arguments]
    start = time.perf_counter()
    out = call(*inputs)
    middle = time.perf_counter()
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    return {"forward": middle - start, "backward": time.perf_counter() - middle}


def rival(case: Case) -> dict:
    """The same on PyTorch's path."""
    with pytorch_paths():
        return seconds(case)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_options(parser, data=False)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--small", action="store_true", help="few tokens, to test this file")
    args = parser.parse_args()
    if cpp_kernels().library is None:
        raise UsageError(f"there are no C++ kernels to time: {cpp_kernels().why}")
    if args.threads:
        torch.set_num_threads(args.threads)
    set_allocator("keep")
    rows = []
    for dtype in (torch.float32, *([torch.bfloat16] if cpp_kernels().bfloat16 else [])):
        peak = matmul_peak(dtype, 64 if args.small else 2048)
        for name, case in cases(dtype, 32 if args.small else 2048).items():
            turns = {"ours": lambda c=case: seconds(c), "pytorch": lambda c=case: rival(c)}
            row = _row(name, dtype, common.interleaved(turns, args.repetitions), case[2], peak)
            rows.append(row)
            common.print_rows([{k: v for k, v in row.items() if k != "repetitions"}])
    wanted = (r for r in rows if r["name"].startswith(("experts", "attention")))
    targets = [
        common.target(
            f"{r['name']}, {r['dtype']}: speed over PyTorch's path", r["speedup"], 1, True
        )
        for r in wanted
    ]
    common.report("cpu_kernels", rows, targets, args)


def _row(name: str, dtype: torch.dtype, found: dict, operations: float, peak: float) -> dict:
    times = {
        f"{side} {phase} ms": 1e3 * statistics.median(r[phase] for r in results)
        for side, results in found.items()
        for phase in ("forward", "backward")
    }
    ours = times["ours forward ms"] + times["ours backward ms"]
    theirs = times["pytorch forward ms"] + times["pytorch backward ms"]
    rate = 3 * operations / ours / 1e6
    return {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        **times,
        "speedup": theirs / ours,
        "gflops": rate,
        "share_of_peak": rate / peak,
        "peak_gflops": peak,
        "repetitions": found,
    }


if __name__ == "__main__":
    common.run(main)
