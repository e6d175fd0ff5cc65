"""bench/gpu_quality.py without a GPU: its plan, its refusals, and (slow) the whole of it at toy sizes."""

import json
import subprocess
import sys

import pytest
import torch

from bench import gpu_quality
from bench.common import ROOT


def call(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "gpu_quality.py")]
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=600)


def test_the_plan_fits_its_time_and_arms_of_a_width_are_equal():
    """FLOPs and parameters within 1% of flat's, the same tokens, 540 s in all."""
    seconds = 0.0
    for part in gpu_quality.PARTS:
        arms = gpu_quality.plan(part, part.needed * part.seconds, False)
        rows = [gpu_quality.planned_row(part, arm, part.needed) for arm in arms]
        assert [row["arm"] for row in rows] == list(part.arms)
        assert len({row["tokens"] for row in rows}) == 1
        for row in rows[1:]:
            assert abs(row["flops_per_token"] / rows[0]["flops_per_token"] - 1) < 0.01
            assert abs(row["total_parameters"] / rows[0]["total_parameters"] - 1) < 0.01
        seconds += sum(row["seconds"] for row in rows)
    assert 400 < seconds <= gpu_quality.LIMIT


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would train")
def test_mistakes_are_one_line(tmp_path):
    for args, why in (((), "give one with --dir"), (("--dir", tmp_path), "no CUDA device")):
        told = call(*args)
        assert told.returncode == 2 and told.stderr.count("\n") == 1 and why in told.stderr


@pytest.mark.slow
def test_the_whole_at_toy_sizes(tmp_path):
    told = call("--small", "--dir", tmp_path, "--json")
    rows = json.loads(told.stdout.splitlines()[-1])["rows"]
    runs = [row for row in rows if "seed" in row]
    assert len(runs) == 8 and {row["error"] for row in runs} == {""}
    for seed in (0, 1):  # pairs read the same tokens
        assert len({row["batches_sha256"] for row in runs if row["seed"] == seed}) == 1
    for row in rows[8:]:
        bits = {(r["arm"], r["seed"]): r["bits_per_byte"] for r in runs}
        pairs = [bits[row["arm"], seed] - bits["flat", seed] for seed in (0, 1)]
        assert row["n"] == 2 and row["mean"] == pytest.approx(sum(pairs) / 2)
