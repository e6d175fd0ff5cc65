"""Signals to all ranks at once, and to torchrun's agent: every rank saves and ends."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headway.checkpoint import checkpoint_dir, save
from headway.train import loop, text_data
from tests.parity.test_runs import RECIPE, on_mesh, ranks_of
from tests.train.tiny_run import records, tiny


def signalled(rank, world, config, when, pids, resume=False):
    """`train` on this rank; at `when`, rank 0 sends to `pids` what Slurm and torchrun's agent
    together do. Its result, or the text of KeyboardInterrupt."""

    def send():
        for pid in [*pids, *pids]:
            os.kill(pid, signal.SIGTERM)

    def from_another_thread():  # which goes on when this one is stopped
        sender = threading.Thread(target=send)
        sender.start()
        sender.join()

    def log(line):
        if when == "tokenising" and line.startswith("tokenised"):
            from_another_thread()

    def before(module, name, number=1):
        inner, calls = getattr(module, name), []

        def patched(*arguments, **options):
            calls.append(None)
            if rank == 0 and len(calls) == number:
                from_another_thread()
            return inner(*arguments, **options)

        return pytest.MonkeyPatch.context(), module, name, patched

    context, module, name, patched = {
        "a step": before(loop, "gradient", 7),
        "the evaluation before step 0": before(text_data, "evaluate"),
        "an asynchronous save": before(save, "write_checkpoint"),
    }.get(when, before(loop, "gradient", 10**9))
    with context as patch:
        patch.setattr(module, name, patched)
        try:
            folder = Path(config.run.dir)
            return loop.train(config, resume=folder if resume else None, log=log)
        except KeyboardInterrupt as error:
            return str(error)


@pytest.fixture(scope="module")
def whole_two(ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole_two")
    return root, ranks.launched(2, signalled, on_mesh(tiny(root)), "never", [])[0]


@pytest.mark.parametrize(
    "when, steps",
    [
        ("a step", {7, 8}),
        ("the evaluation before step 0", {1}),
        ("an asynchronous save", range(5, 20)),
    ],
)
def test_all_ranks_save_after_the_same_step(ranks, whole_two, tmp_path, when, steps):
    config = on_mesh(tiny(tmp_path), async_checkpoint=when == "an asynchronous save")
    pids = [process.pid for process in ranks.processes[:2]]
    for result in ranks.launched(2, signalled, config, when, pids):
        assert result["interrupted"] and result["error"] == "" and result["steps"] in steps
    newest, problems = checkpoint_dir.latest(tmp_path / "run")
    assert newest.name == f"step-{result['steps']:06d}" and problems == []
    result = ranks.launched(2, signalled, config, "never", [], True)[0]
    whole, expected = whole_two
    keys = ("val_bits_per_byte", "first_val_bits_per_byte", "loss", "sample", "steps")
    assert {k: result[k] for k in keys} == {k: expected[k] for k in keys}
    assert lines(tmp_path) == lines(whole)
    for file in ("model.safetensors", "optimizer.safetensors"):
        last = Path("run", "checkpoints", "step-000020", file)
        assert (tmp_path / last).read_bytes() == (whole / last).read_bytes()


def lines(root):
    """Records without traffic, which an interval counts from the resume on."""
    return [{k: v for k, v in r.items() if not k.startswith("wire")} for r in records(root)]


def test_all_ranks_leave_while_one_tokenises(ranks, tmp_path):
    config = on_mesh(tiny(tmp_path))
    pids = [process.pid for process in ranks.processes[:2]]
    text = "SIGTERM: nothing to save yet; the same command starts again"
    assert ranks.launched(2, signalled, config, "tokenising", pids) == [text, text]
    assert not (tmp_path / "run").exists()
    # of the cache only what is tokenised is kept, to go on with
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert all(path.name.endswith(".parts") for path in folders)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")
def test_torchrun_and_its_ranks(tmp_path):
    """As Slurm does it: agent and ranks get the signal, and the ranks again from the agent."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    words = ["train", f"{tmp_path}/recipe.py:tiny", "--run", str(tmp_path / "run")]
    often = ["--steps", "9000", "--run.eval-every", "9000", "--run.async-checkpoint"]
    path = os.pathsep.join(p for p in sys.path if p)
    printed, sent = "", False
    with subprocess.Popen(
        [*launcher, "-m", "--", "headway", *words, *often, "--run.checkpoint-every", "2"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            printed += line
            if not sent and re.match(r"step +6/", line):
                sent = True
                for pid in (*ranks_of(job.pid).values(), job.pid):
                    os.kill(pid, signal.SIGTERM)
    assert sent, printed
    assert job.returncode == 1  # whatever its ranks return, after a signal
    said = re.findall(r"^SIGTERM.*|^headway.*", printed, re.MULTILINE)
    assert len(said) == 2 and said[0] == "SIGTERM: finishing this step, then saving"
    step = re.match(r"SIGTERM: step (\d+) is finished, saved ", said[1])
    newest, problems = checkpoint_dir.latest(tmp_path / "run")
    assert step and newest.name == f"step-{int(step[1]):06d}" and problems == []
    assert not (tmp_path / "run" / "lock.json").exists()
