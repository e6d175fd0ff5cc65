"""The kernels of the experts as a GPU would run them: tensor cores, registers, shared memory.

Compiled in a process of its own, since Triton interprets or compiles per process.
"""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import dataclasses, json, sys
import torch
from bench.dry_launch import dry_launches
from headway.kernels.gpu import experts
from headway.kernels.paths import ExpertInputs

capability, L, F, activation = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
G, N, K, H, E = (2 if activation == "swiglu" else 1), 2048, 4, 2, 8


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


x = empty(N, L, dtype=torch.bfloat16)
tables = [empty(*shape, dtype=torch.int32) for shape in ((N * K,), (N, K), (H, E))]
weights = (empty(H, E, G, F, L), empty(H, E, F, L))
inputs = ExpertInputs(x, empty(N, K), *weights, *tables, activation)
with dry_launches(capability) as found:
    experts.forward(inputs, False)
    if capability >= 90 and L <= 256:
        experts.forward(inputs, False, "float8")
    experts.backward(x, inputs, empty(0, G * F), False)
print(json.dumps([dataclasses.asdict(kernel) for kernel in found]))
"""
SPILL = 64
"""Bytes per thread that Triton 3.9 puts on the stack for tiles that are the fastest ones, and spill nothing, with 3.6 on an H100."""
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
CORES = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}


def check(capability: int, L: int, F: int, activation: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, (capability, L, F, activation))],
        env=environment | {"HEADWAY_TRITON": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout.splitlines()[-1])
    multiply = [k for k in kernels if k["name"].startswith(("experts", "wide"))]
    names = [k["name"] for k in multiply]
    wide = ["wide_gradients", "wide_rows", "wide_weights", "wide_weights"]
    if L > 256:
        assert names == ["wide_hidden", "wide_rows", *wide]
    elif L > 128:
        assert names[-4:] == wide and names[0] == "experts_forward"
    else:
        assert names[-2:] == ["experts_backward_rows", "experts_backward_weights"]
    assert ("experts_forward_float8" in names) == (capability >= 90 and L <= 256)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability] * 1024, kernel
        if capability >= 90:
            assert kernel["stack"] <= SPILL, kernel
    assert {k["tensor_core"] for k in multiply} == {CORES[capability]}


@pytest.mark.parametrize(
    ("capability", "L"), [(90, 64), (90, 128), (90, 256), (100, 128), (100, 512)]
)
def test_tensor_cores_and_no_spills(capability, L):
    check(capability, L, 256, "swiglu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "L"),
    [(c, L) for c in (80, 90, 100) for L in (32, 64, 96, 128, 256, 384, 2048)]
    + [(89, 256), (89, 512), (120, 512)],
)
@pytest.mark.parametrize(
    ("F", "activation"),
    [(128, "swiglu"), (512, "swiglu"), (192, "swiglu"), (256, "gelu"), (256, "relu2")],
)
def test_tensor_cores_and_no_spills_at_every_shape(capability, L, F, activation):
    check(capability, L, F, activation)
