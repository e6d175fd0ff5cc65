"""Whole runs on meshes: resumed on another one, with checkpoints in the background, killed."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headway.cli import main as cli
from headway.config import MeshConfig, UsageError
from headway.report.sinks import read_metrics
from headway.train.loop import train
from tests.train.tiny_run import quiet, records, tiny

TWO = MeshConfig(hp=2)


def runs(rank, world, config, resume=False):
    """`train` on this rank of a job: (loss, what the leader logged), or a mistake and its text."""
    lines: list[str] = []
    try:
        result = train(
            config,
            resume=Path(config.run.dir) if resume else None,
            log=lines.append if rank == 0 else quiet,
        )
    except UsageError as error:
        return type(error).__name__, str(error)
    return result["loss"], lines


def on_mesh(config, mesh=TWO, **run):
    """Two rows at once on each rank; `run` changes that part of the config."""
    return dataclasses.replace(config, mesh=mesh, run=dataclasses.replace(config.run, **run))


def test_a_run_goes_on_with_another_mesh_through_the_command_line(ranks, tmp_path, capsys):
    config = tiny(tmp_path, optim={"steps": 8}, data={"micro_batch_size": 0})
    ranks.launched(2, runs, on_mesh(config))
    resume = ["train", "--resume", str(tmp_path / "run"), "--steps"]
    assert cli.main([*resume, "10", "--mesh", "hp=1"]) == 0
    printed = capsys.readouterr().out
    line = "resume: saved on dp=1, hp=2, ep=1, goes on with dp=1, hp=1, ep=1"
    assert printed.count(line) == 1 and "step 10/10" in printed
    assert cli.main([*resume, "12", "--mesh", "hp=2"]) == 2
    assert "needs 2 processes and there is 1; start it with: torchrun" in capsys.readouterr().err
    assert cli.main([*resume, "12", "--mesh", "dp=3,hp=2"]) == 2
    assert "must divide batch_size=4" in capsys.readouterr().err
    assert cli.main([*resume, "12", "--mesh", "dp=2,hp=2"]) == 2
    assert "micro_batch_size=2 must divide batch_size=4" in capsys.readouterr().err


def test_asynchronous_checkpoints_of_a_mesh_resume_to_the_same_bits(ranks, tmp_path):
    for name, cut in (("whole", {}), ("cut", {"stop_bits_per_byte": 6.0})):
        config = on_mesh(tiny(tmp_path / name), async_checkpoint=name == "cut", **cut)
        losses = [loss for loss, _ in ranks.launched(2, runs, config)]
        assert losses[0] == losses[1]
    lines = ranks.launched(2, runs, on_mesh(config, stop_bits_per_byte=0.0), True)[0][1]
    assert any(line.startswith("resumed from") for line in lines)
    assert records(tmp_path / "whole")[-1] == records(tmp_path / "cut")[-1]
    last = "run/checkpoints/step-000020"
    for file in ("model.safetensors", "optimizer.safetensors"):
        whole, cut = (tmp_path / name / last / file for name in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()


def test_the_metrics_file_tells_what_each_layer_sent(ranks, tmp_path):
    ranks.launched(2, runs, on_mesh(tiny(tmp_path)))
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "wire" in r]
    for record in records:
        layers = record["wire_layers"]
        assert layers["layer"] == [0, 1] and layers["weights"] == [0, 0]
        assert layers["bytes"] == layers["expected"]
        assert sum(layers["bytes"]) == record["wire_bytes"] == record["wire_expected"]
        waited = sum(c["wait"] for key, c in record["wire"].items() if key.startswith("hp "))
        every = sum(c["wait"] for c in record["wire"].values())
        assert sum(layers["wait"]) == pytest.approx(record["wire_wait"] * waited / every, abs=1e-5)
    assert len(records) > 1


def with_own_text(rank, world, root):
    """Every rank has another text under the same name."""
    config = tiny(root / str(rank))
    (root / str(rank) / "text.txt").write_text(f"Something else {rank}. " * 3000)
    data = dataclasses.replace(config.data, source=("text.txt",), cache_dir="cache")
    before = os.getcwd()
    os.chdir(root / str(rank))
    try:
        return runs(rank, world, dataclasses.replace(on_mesh(config, dir="run"), data=data))
    finally:
        os.chdir(before)


def test_other_data_on_another_rank_is_found_before_step_0(ranks, tmp_path):
    (kind, text), (other, _) = ranks.launched(2, with_own_text, tmp_path)
    assert kind == "UsageError" and text.startswith("rank 1 has the fingerprint of the data=")
    assert other == "PeerError" and not (tmp_path / "0" / "run").exists()


def test_a_mistake_that_rank_0_meets_is_told_once(ranks, tmp_path):
    config = on_mesh(tiny(tmp_path))
    (tmp_path / "run").write_text("a file")
    (kind, text), (other, _) = ranks.launched(2, runs, config)
    assert kind == "UsageError" and text.startswith("cannot write ") and other == "PeerError"


RECIPE = """
import dataclasses, pathlib
from headway.config import MeshConfig
from tests.train.tiny_run import tiny as base

def tiny():
    config = base(pathlib.Path(__file__).parent)
    return dataclasses.replace(config, mesh=MeshConfig(hp=2, timeout=8.0))
"""


def torchrun(root, run, faults=()):
    """A job of two ranks; each of `faults` (line that is awaited, signal, rank) happens once. What
    was printed, without torchrun's own reports."""
    (root / "recipe.py").write_text(RECIPE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    command = ["--nproc-per-node", "2", "-m", "--", "headway", "train", f"{root}/recipe.py:tiny"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    printed, waiting, stopped = [], list(faults), 0
    with subprocess.Popen(
        [sys.executable, *launcher, *command, "--run", str(root / run)],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            printed.append(line.rstrip())
            if waiting and line.startswith(waiting[0][0]):
                _, sent, rank = waiting.pop(0)
                stopped = ranks_of(job.pid)[rank]
                os.kill(stopped, sent)
            if stopped and line.startswith("headway: rank"):
                os.kill(stopped, signal.SIGKILL)  # torchrun would wait for it for half a minute
    assert job.returncode == 0, "\n".join(printed)
    return [line for line in printed if line.startswith(("headway", "restart", "resumed", "Trace"))]


def ranks_of(launcher):
    """Rank → process."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True
    )
    pids = {}
    for pid in map(int, listed.stdout.split()):
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        pids |= {int(v[5:]): pid for v in variables if v.startswith("RANK=")}
    return pids


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")
def test_killed_and_stopped_ranks_end_with_the_same_bits(tmp_path):
    assert torchrun(tmp_path, "whole") == []
    faults = [
        ("step  6/20", signal.SIGKILL, 1),
        ("step  9/20", signal.SIGKILL, 0),
        ("step 12/20", signal.SIGSTOP, 1),
    ]
    run = tmp_path / "killed"
    printed = torchrun(tmp_path, "killed", faults)
    assert [line for line in printed if line.startswith("restart")] == [
        f"restart {n} by torchrun: resume {run}" for n in (1, 2, 3)
    ]
    hung = [line for line in printed if "did not join a collective within 8 s" in line]
    assert len(hung) == 1 and hung[0].startswith("headway: rank 1 is at step ")
    assert not [line for line in printed if line.startswith("Trace")]
    last = "checkpoints/step-000020"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (run / last / file).read_bytes() == (tmp_path / "whole" / last / file).read_bytes()
    text = [(path / "metrics.jsonl").read_text() for path in (run, tmp_path / "whole")]
    assert text[0].count('"event": "resumed"') == 3 and text[1].count('"event"') == 0
