"""What `doctor --measure` counts and writes; the rates themselves belong to the machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from headway.measure import rates as m
from headway.measure.links import two_numbers
from headway.plan.link import Curve
from headway.plan.machine import NUMBERS, read_machine

CPU = torch.device("cpu")


def test_best_leaves_the_first_call_out():
    times = iter([0.05, 0.002, 0.01])
    assert 0.002 <= m.best(lambda: time.sleep(next(times)), CPU, 0.0) < 0.009


def test_rates_are_work_over_time(monkeypatch):
    """With a clock that says half a second for everything."""

    def half_a_second(run, device, seconds):
        run()
        return 0.5

    monkeypatch.setattr(m, "best", half_a_second)
    assert m.matmul_flops(CPU, torch.float32, 4, 8, 16, 0) == 2 * 4 * 8 * 16 / 0.5
    assert m.copy_bandwidth(CPU, 1000, 0) == 2000 / 0.5
    monkeypatch.setattr(m, "_SMALL_EXPERTS", (8, 2, 16, 4, 2, 8))
    rate, what = m.experts_flops(CPU, torch.float32, 0)
    # forward 3 matmuls of 16 × 8 per row, backward twice that
    assert rate == 3 * 2 * (8 * 2 * 2) * 3 * 8 * 16 / 0.5 and "T 8, H 2" in what
    rate, _ = m.attention_flops(CPU, torch.float32, 0)
    assert rate == 3 * 4 * 4 * 4 * 64 * (256 * 257 / 2) / 0.5
    speed, what = m.rows_bandwidth(CPU, torch.float32, 0)
    assert speed == 8192 * 192 * (12 * 4 + 44) / 0.5 and what.startswith("8192 rows of 192")


def test_two_numbers_of_a_curve():
    """The rate of the largest exchange, and the smallest over its three messages."""
    rates = two_numbers(Curve("all_to_all", 4, True, 1, ((4.0, 6e-3), (1e6, 0.5))))
    assert rates == pytest.approx((2e6, 2e-3))


@pytest.mark.slow
def test_the_network_under_torchrun(tmp_path):
    """Two processes on this machine: bandwidth within the node and latency; rank 0 writes and
    speaks."""
    root = Path(__file__).resolve().parents[1]
    file = tmp_path / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "headway", "doctor", "--measure", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.strip().splitlines()[-1])
    assert printed == json.loads(file.read_text()) and printed["ranks"] == 2
    assert done.stdout.count("\nall-to-all") == 1
    assert {"intra_node", "latency"} <= set(printed["measured"]) <= set(NUMBERS)
    machine = read_machine(str(file))
    assert machine.origin_of("intra_node") == "measured" and 1e-7 < machine.latency < 0.1
    kinds = [(c.collective, c.at_once, c.ranks, c.inside) for c in machine.curves]
    names = ("all_to_all", 1), ("all_to_all", 2), ("all_reduce", 1), ("overlap_cost", 1)
    assert kinds == [(w, n, 2, True) for w, n in names]
    assert done.stdout.count("\nbeside work") == 1
    exchange, _, ring, overlap_cost = machine.curves
    assert [n for n, _ in overlap_cost.points] == [n for n, _ in exchange.points]
    assert two_numbers(exchange) == (machine.intra_node, machine.latency)
    # the same bytes leave a rank in both, up to whole values and rows
    assert [n for n, _ in ring.points] == pytest.approx([n for n, _ in exchange.points], rel=0.01)
