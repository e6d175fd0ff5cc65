"""The router's and the row sort's kernels as a GPU would run them: compiled, not run."""

import json
import os
import subprocess
import sys

import pytest

SPILL = 64
"""Bytes per thread: the assembler itself gives up some to stay below 168 or 128 registers, where one more program fits a multiprocessor,
and the tiles that are the fastest on an H100 put some on the stack with other gates, more experts or another Triton."""

WORK = """
import json, sys, torch
from bench.dry_launch import dry_launches
from headway.kernels.gpu import route, route_backward, route_sparse
from headway.kernels.gpu.ops import _empty

found = []
for capability, L, E, K, gate in json.loads(sys.argv[1]):
    T, H = 65536, 8
    with torch.device("meta"), dry_launches(capability) as compiled:
        x, w = torch.empty(T, H, L, dtype=torch.bfloat16), torch.empty(H, E, L)
        out = _empty(x, w, None, K, gate)
        route.forward(x, w, torch.empty(H, E), None, out, gate, False, 1.0)
        gates, prob, z, _, _, index, kept, sums = out
        kept = gates if gate == "topk_softmax" else kept
        grads = (torch.empty_like(gates), torch.empty_like(prob), None)
        saved = (x, w, index, kept, sums)
        route_backward.backward(*saved, *grads, gate, False, 1.0, torch.empty_like(x), torch.empty_like(w))
        route_sparse.backward(x, w, index, torch.empty_like(gates), torch.empty_like(x), torch.empty_like(w))
    found += [[L, E, K, c.name, c.capability, c.registers, c.stack, c.shared, c.tensor_core] for c in compiled]
print(json.dumps(found))
"""


def compile_all(cases) -> list:
    """What each kernel takes; in a process where Triton compiles."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "HEADWAY_TRITON"))}
    command = [sys.executable, "-W", "ignore", "-c", WORK, json.dumps(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(cases) -> None:
    multiply = {"_choose", "_columns", "_slots", "_d_tokens", "_d_weights"}
    found = compile_all(cases)
    names = {kernel[3] for kernel in found}
    others = {"split_into", "_finish", "_walk", "_blocks"}
    others |= {"_sparse_tokens", "_sparse_weights", "_sparse_sums"}
    assert names == (others | multiply) - (
        set() if any(case[2] > 128 for case in cases) else {"_columns"}
    )
    for kernel in found:
        _, _, _, name, capability, _, stack, shared, core = kernel
        assert stack <= SPILL, f"{kernel} spills"
        assert shared <= (99 if capability == 80 else 227) * 1024, kernel
        if name in multiply:
            assert core == ("mma" if capability == 80 else "wgmma" if capability == 90 else core)
            assert core, f"{kernel} does not multiply on tensor cores"


def test_no_spills_and_little_shared_memory():
    check([(80, 64, 64, 4, "topk_softmax"), (90, 256, 1024, 8, "sigmoid")])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_spills_at_any_shape(capability):
    check(
        [
            (capability, L, E, K, gate)
            for L in (64, 128, 256)
            for E in (64, 256, 1024)
            for K, gate in ((2, "softmax_topk"), (4, "sigmoid"), (8, "topk_softmax"))
        ]
    )
