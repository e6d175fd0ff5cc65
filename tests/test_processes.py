"""`headway` as a process of its own: exit codes and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.command import call


def headway(*args: object) -> list[str]:
    return [sys.executable, "-m", "headway", *(str(a) for a in args)]


def test_module_and_exit_codes(tmp_path):
    done = subprocess.run(
        headway("train", "dmo"), capture_output=True, text=True, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("headway: unknown recipe 'dmo'") and done.stderr.count("\n") == 1


def test_sigint_saves_exits_130_and_resumes(place):
    folder = place / "runs" / "interrupted"
    args = headway(
        "train",
        f"{place}/tiny.py:tiny",
        "--run",
        folder,
        "--steps",
        100_000,
        "--run.eval-every",
        100_000,
    )
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=environment())
    metrics = folder / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (
        metrics.is_file() and metrics.read_text().count("\n") > 3
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out.splitlines()[-1].endswith(f"headway train --resume {folder}")
    saved = sorted((folder / "checkpoints").glob("step-*"))[-1]
    step = int(saved.name.removeprefix("step-"))
    done = call("train", "--resume", folder, "--steps", step + 1, "--json")
    assert done.code == 0 and done.json["steps"] == step + 1


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
