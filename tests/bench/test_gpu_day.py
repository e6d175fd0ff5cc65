"""bench/gpu_day.py without a GPU: every stage at toy sizes, what a stage that fails costs, its targets, its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here kernels are compiled")


def call(*args: object, timeout: float = 600) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "gpu_day.py")]
    return subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True, timeout=timeout
    )


def test_every_stage_runs_at_toy_sizes_and_a_second_call_goes_on(tmp_path):
    """Ours is right, every rival that can run here gives numbers, and what is done is not done again."""
    found = call("--dry", "--out", tmp_path, "--json")
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout.splitlines()[-1])
    assert document["bench"] == "gpu_day_dry"
    rows = {}
    for row in document["rows"]:
        rows.setdefault(row["stage"], []).append(row)
    failed = [r for r in document["rows"] if "error" in r]
    assert {r["stage"] for r in failed} <= {"step"}, failed  # transformers is an extra
    assert set(rows) == {
        *"machine tests check user whole profile tiles experts router layer step sanitizer".split()
    }
    assert rows["tests"][-1]["passed"] > 5 and rows["tests"][-1]["failed"] == 0
    user = {row["what"]: row for row in rows["user"]}
    assert user["resume demo"]["same_bits"] and user["resume demo"]["steps"] == 4
    assert user["engine, greedy"]["same"] == user["engine, greedy"]["tokens"] == 32
    assert user["eval"]["cpu float32"] > 4 and user["engine, whole"]["decode_step_ms"] > 0
    (small,) = rows["whole"]
    assert small["launches"] > 100 and small["kernels"][0]["ms"] >= small["kernels"][1]["ms"] > 0
    assert 0 < small["update_ms"] < small["step_ms"] and small["device_ms"] > 0
    for row in rows["check"]:
        assert 1e-4 < row["output"] < 1e-2 and 1e-4 < row["gradient"] < 1e-2, row
    assert {"headway", "grouped_mm", "ScatterMoE", "dense loop"} <= set(rows["experts"][0]["ms"])
    assert rows["router"][0]["same_choice"] == 1.0 and set(rows["router"][0]["balance_ms"]) == {
        "headway",
        "naive",
    }
    for row in rows["tiles"]:
        assert row["best"]["ms"] == min(t["ms"] for t in row["tried"])
    own = [r for r in rows["step"] if r["what"].startswith("headway")]
    assert len(own) == 2 and all(3 < r["loss"] < 6 for r in own)  # log 64 = 4.2
    assert {t["name"] for t in document["targets"] if t["pass"]} >= {
        "tests that failed",
        "error of the output",
        "stages not whole",
    }
    again = call("--dry", "--out", tmp_path, "--stages", "machine", "check")
    assert again.stdout.count("done before") == 2


def test_a_stage_that_hangs_is_ended_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    from bench import gpu_day, gpu_stages

    monkeypatch.setitem(gpu_stages.SECONDS, "tests", 0.5)
    document = gpu_day.run_stage("tests", tmp_path, True, gpu_stages.SECONDS["tests"])
    assert not document["done"] and "stopped after" in document["error"]
    assert gpu_stages.load(tmp_path, "tests") == document


def test_a_row_that_fails_says_why_and_the_next_one_is_tried(tmp_path, monkeypatch):
    from bench import gpu_stages
    from headway.kernels.gpu import GpuKernels

    monkeypatch.setattr(gpu_stages, "gpu_kernels", lambda: GpuKernels("cpu", "a test"))
    record = gpu_stages.Record(tmp_path, "router", True)
    record.attempt("first", lambda: {"ms": 1 / 0})
    record.attempt("second", lambda: {"ms": 3.0})
    rows = gpu_stages.load(tmp_path, "router")["rows"]
    assert rows[0]["error"] == "ZeroDivisionError: division by zero" and rows[1]["ms"] == 3.0
    assert "FAILED ZeroDivisionError" in next(gpu_stages.lines("router", rows[:1]))


def row(stage, part, ms, **more):
    return {"stage": stage, "part": part, "ms": ms, **more}


def test_a_target_is_the_worst_shape_against_the_fastest_rival():
    from bench.gpu_stages import targets

    rows = [
        row("experts", "experts", {"headway": 1.0, "grouped_mm": 2.0, "grouped_mm, compiled": 1.5}),
        row("experts", "experts", {"headway": 1.0, "grouped_mm": 1.3, "FlexAttention": 3.0}),
        row("experts", "experts", {"headway": 1.0}, failed={"grouped_mm": "ValueError"}),
        row(
            "layer",
            "layer",
            {"headway": 2.0, "grouped_mm": 3.0, "dense loop": 2.5},
            peak_mib={"headway": 10.0, "grouped_mm": 40.0},
        ),
        row(
            "router",
            "router",
            {"headway": 1.0, "naive": 4.0},
            forward_ms={"headway": 1, "IEEE top-k": 1.2},
        ),
        {"stage": "experts", "what": "another", "error": "out of memory"},
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
    assert "flat MoE: grouped_mm / headway" not in passed and "tests that failed" not in passed
    assert (
        "router: IEEE top-k / headway" not in passed and "layer: peak memory / grouped_mm" in passed
    )


def test_the_fastest_tiles_can_be_kept(tmp_path, monkeypatch):
    from bench.gpu_tiles import keep
    from headway.config import UsageError
    from headway.kernels.gpu import tune
    from headway.kernels.gpu.tune import Tiles, tiles

    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    tune._measured.cache_clear()
    with pytest.raises(UsageError, match=r"there is no tiles.json; run bench/gpu_day.py first"):
        keep(tmp_path)
    best = {"rows": 64, "cols": 32, "warps": 4, "stages": 3, "ms": 1.0, "registers": 99}
    rows = [{"key": "experts_forward 64 2 256 2", "best": best}, {"error": "no row"}]
    (tmp_path / "tiles.json").write_text(json.dumps({"rows": rows}))
    keep(tmp_path)
    assert tiles("experts_forward", (64, 2, 256, 2), Tiles(16, 16, 4, 1)) == Tiles(64, 32, 4, 3)
    tune._measured.cache_clear()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "no GPU kernels here"),
        (["--dry", "--stages", "profil"], "--stages profil is not known; use some of machine"),
        (["--dry", "--minutes", "0"], "--minutes must be above 0, not 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, args, why):
    found = call("--out", tmp_path, *args)
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and why in found.stderr
