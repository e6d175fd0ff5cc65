"""What the GPU kernels would take of each GPU, without one: registers, spills, shared memory.

    python bench/gpu_resources.py [--capability 80 90 100] [--width 64 128 256 512] [--save]

Every kernel is compiled at its default tiles for the sizes below (`bench/dry_launch.py`). `blocks`
is how many blocks of threads fit one multiprocessor by registers, shared memory and 2,048 threads;
spilled bytes are stack that registers did not hold.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from headway.config import UsageError

T, H, E, K, F = 32768, 8, 256, 4, 256
"""Tokens, heads, experts per head, chosen, hidden width (SwiGLU)."""

SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
"""Shared memory of a multiprocessor, by compute capability."""


def launches(capability: int, L: int) -> list[dict]:
    """A forward and a backward pass of router, sort and experts; the router's backward both with
    the gradient of a balance loss and by slots."""
    from bench.dry_launch import dry_launches
    from headway.kernels.gpu import experts, ops, route, route_backward, route_sparse
    from headway.kernels.gpu import permute as rows
    from headway.kernels.paths import ExpertInputs

    gate, N = "topk_softmax", T * H
    with torch.device("meta"), dry_launches(capability) as found:
        x_THL, w_HEL = torch.empty(T, H, L, dtype=torch.bfloat16), torch.empty(H, E, L)
        out = ops._empty(x_THL, w_HEL, None, K, gate)
        route.forward(x_THL, w_HEL, torch.empty(H, E), None, out, gate, False, 1.0)
        gate_THK, prob_HE, _, _, _, index_THK, _, sums = out
        grads = (torch.empty_like(x_THL), torch.empty_like(w_HEL))
        route_backward.backward(
            *(x_THL, w_HEL, index_THK, gate_THK, sums, torch.empty_like(gate_THK)),
            *(torch.empty_like(prob_HE), None, gate, False, 1.0, *grads),
        )
        route_sparse.backward(x_THL, w_HEL, index_THK, torch.empty_like(gate_THK), *grads)
        tables = rows.sort_rows(index_THK, E)
        x_NL, gate_NK = x_THL.view(N, L), gate_THK.view(N, K)
        weights = (torch.empty(H, E, 2, F, L), torch.empty(H, E, F, L))
        inputs = ExpertInputs(x_NL, gate_NK, *weights, *tables, "swiglu")
        experts.forward(inputs, False)
        experts.backward(x_NL, inputs, torch.empty(0, 2 * F), False)
    return [asdict(kernel) for kernel in found]


def blocks(kernel: dict) -> int:
    """Of one kernel that fit a multiprocessor at once."""
    by_registers = 65536 // (32 * kernel["warps"] * -(-kernel["registers"] // 8) * 8)
    by_shared = SHARED_KIB[kernel["capability"]] * 1024 // (kernel["shared"] + 1024)
    return min(by_registers, by_shared, 2048 // (32 * kernel["warps"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, nargs="+", default=[90])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128, 256, 512], help="L")
    common.add_options(parser, data=False)
    args = parser.parse_args()
    os.environ.pop(
        "TRITON_INTERPRET", None
    )  # compiled, not interpreted; read when Triton is imported
    if unknown := set(args.capability) - set(SHARED_KIB):
        known = ", ".join(map(str, SHARED_KIB))
        raise UsageError(f"--capability {min(unknown)} is not known; use some of {known}")
    if any(L % 16 or L < 16 for L in args.width):
        raise UsageError(f"--width {args.width} must be multiples of 16")
    rows: list[dict] = []
    for capability in args.capability:
        for L in args.width:
            seen = set()
            for kernel in launches(capability, L):
                name = kernel["name"].lstrip("_")
                row = {"kernel": name, "L": L} | {k: kernel[k] for k in KEPT}
                row["blocks"] = blocks(kernel)
                if (name, str(row)) not in seen:  # the same kernel may be launched twice
                    seen.add((name, str(row)))
                    rows.append(row)
                    common.print_rows([row])
    common.report("gpu_resources", rows, [], args)


def table(rows: list[dict]) -> str:
    """For docs/kernels.md: registers / KiB of shared memory / blocks per multiprocessor, and the
    bytes spilled where there are any."""
    places = sorted({(r["capability"], r["L"]) for r in rows})
    lines = ["| kernel | " + " | ".join(f"sm_{c}, L {L}" for c, L in places) + " |"]
    lines.append("|---|" + "---|" * len(places))
    shown = (r for r in rows if r["tensor_core"] or r["kernel"].startswith("sparse"))
    for name in dict.fromkeys(r["kernel"] for r in shown):
        cells = []
        for place in places:
            found = [r for r in rows if (r["capability"], r["L"]) == place and r["kernel"] == name]
            if not found:  # other kernels do this width
                cells.append("")
                continue
            r = found[0]
            spilled = f", {r['stack']} B spilled" if r["stack"] else ""
            cells.append(f"{r['registers']}/{r['shared'] // 1024}/{r['blocks']}{spilled}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


KEPT = ("capability", "warps", "stages", "registers", "stack", "shared", "tensor_core")

if __name__ == "__main__":
    common.run(main)
