"""bench/gpu_layer.py without a GPU: its check at small sizes, its targets, its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def call(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_layer.py"), *args],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_check_holds_the_bounds_and_shows_what_rivals_lose():
    found = call("--check", "--json")
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout.splitlines()[-1])
    assert document["bench"] == "gpu_layer_check" and all(t["pass"] for t in document["targets"])
    output = {(r["shape"], r["name"]): r["output"] for r in document["rows"]}
    own = [error for (_, name), error in output.items() if name == "headway"]
    assert len(own) == 2 and 1e-4 < min(own) <= max(own) < 3e-3
    assert {name for _, name in output} >= {"headway", "grouped_mm", "dense loop", "ScatterMoE"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_no_gpu_is_one_line():
    found = call()
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert "no GPU kernels here" in found.stderr and "--check" in found.stderr


def test_repeats_are_checked():
    found = call("--repeats", "0")
    assert found.returncode == 2 and "got 0" in found.stderr


def row(part, ms, **more):
    return {"part": part, "L": 256, "F": 512, "ms": ms, "share_of_matmul": 0.6, **more}


def test_a_target_is_the_worst_shape_against_the_fastest_rival():
    from bench.gpu_layer import targets

    peak = {"headway": 10.0, "grouped_mm": 40.0}
    rows = [
        row("experts", {"headway": 1.0, "grouped_mm": 2.0, "grouped_mm, compiled": 1.5}),
        row("experts", {"headway": 1.0, "grouped_mm": 1.3, "FlexAttention": 3.0}),
        row("layer", {"headway": 2.0, "grouped_mm": 3.0, "dense loop": 2.5}, peak_mib=peak),
        row("router", {"headway": 1.0, "naive": 4.0}, forward_ms={"headway": 1, "IEEE top-k": 1.2}),
    ]
    found = {t["name"]: t for t in targets(rows)}
    value = {name: t["value"] for name, t in found.items()}
    assert value["experts: grouped_mm / headway"] == 1.3
    assert value["experts: FlexAttention / headway"] == 3.0
    assert value["layer: best rival / headway"] == 1.25
    assert value["router: IEEE top-k / headway"] == 1.2
    assert value["layer: peak memory / grouped_mm"] == 0.25
    assert value["flat MoE: grouped_mm / headway"] is None  # not measured is not met
    passed = {name for name, t in found.items() if t["pass"]}
    assert "flat MoE: grouped_mm / headway" not in passed
    assert "router: IEEE top-k / headway" not in passed
    assert "experts: share of the matmul peak at L 256, F 512" in passed


def test_a_rival_that_fails_is_recorded_and_left_out():
    from bench.gpu_rows import able, each

    def fails():
        raise ValueError("too wide\nsecond line")

    failed: dict[str, str] = {}
    works = list
    assert able({"headway": works, "a": fails}, failed) == {"headway": works}
    assert each({"b": lambda: 2, "c": fails}, failed) == {"b": 2}
    assert failed == {"a": "ValueError: too wide", "c": "ValueError: too wide"}
    with pytest.raises(ValueError, match="too wide"):
        able({"headway": fails}, failed)
