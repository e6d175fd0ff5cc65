"""A server on a mesh of two ranks, started by torchrun."""

import json
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from tests.parity.test_runs import ranks_of
from tests.server.served import ROOT, until

ASK = {"prompt": "def x ", "max_tokens": 9, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def start(run, tmp_path):
    """Starts a server of two ranks: `start(mesh)` → its launcher, an HTTP client."""
    jobs = []

    def start(mesh):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        verb = ["--nproc-per-node", "2", "-m", "--", "headway", "serve", str(run), "--mesh", mesh]
        job = subprocess.Popen(
            [*launcher, *verb, "--port", "0", "--json", "--dtype", "float32"],
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "log.txt").open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        jobs.append(job)
        line = job.stdout.readline()
        assert line, (tmp_path / "log.txt").read_text()
        return job, httpx.Client(base_url=json.loads(line)["url"], timeout=60)

    yield start
    for job in jobs:
        for pid in ranks_of(job.pid).values() if job.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        job.kill()
        job.communicate()


def lines_of(tmp_path):
    """What the ranks printed on stderr, without torchrun's report."""
    log = (tmp_path / "log.txt").read_text()
    return [line for line in log.splitlines() if line.startswith("headway: ")]


@pytest.mark.parametrize("busy", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_server_with_its_number(start, tmp_path, busy):
    job, http = start("hp=2")
    assert http.post("/v1/completions", json=ASK).status_code == 200
    events = []

    def read():
        body = {**ASK, "max_tokens": 240, "n": 20, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                events.append(line)

    stream = threading.Thread(target=read)
    if busy:
        stream.start()
        until(lambda: len(events) > 20)
    os.kill(ranks_of(job.pid)[1], signal.SIGKILL)
    assert job.wait(60) != 0
    if busy:
        stream.join(10)
        assert events[-2:] == ["data: [DONE]", ""] and '"server_stopping"' in events[-4]
    (line,) = lines_of(tmp_path)
    assert line.startswith("headway: rank 1 is at ") and line.endswith(": it left the job")
    assert "stopped" not in job.stdout.read()


@pytest.mark.slow
def test_the_experts_of_all_ranks_are_counted(start, server):
    """Those of one process; of two ranks with halves of the experts one reads more."""
    job, http = start("ep=2")
    ask = {**ASK, "prompt": "import a\n", "max_tokens": 30}
    sums = []
    for client in (server.http, http):
        before = metrics(client)
        text = client.post("/v1/completions", json=ask).json()["choices"][0]["text"]
        after = metrics(client)
        sums.append([text, *(after[k] - before[k] for k in after)])
    (alone, total, busiest, steps), on_mesh = sums
    assert total == busiest and on_mesh[0] == alone
    assert on_mesh[1] == total and on_mesh[3] == steps
    assert total / 2 <= on_mesh[2] < total
    os.kill(ranks_of(job.pid)[0], signal.SIGTERM)
    assert json.loads(job.stdout.readline())["event"] == "stopped"
    assert job.wait(60) == 0


def metrics(client):
    """Sums of /metrics."""
    lines = dict(
        line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[:1] != "#"
    )
    names = "experts_touched_sum experts_touched_busiest_rank_sum step_seconds_count"
    return {name: float(lines[f"headway_{name}"]) for name in names.split()}
