"""A tiny model that is really trained, and a server of it in a process of its own."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from headway.train import loop
from tests.train.tiny_run import quiet, tiny

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 256


def train_tiny(root: Path) -> Path:
    """Train bytes for 30 steps; return the run folder."""
    config = tiny(
        root,
        data={"seq_len": CONTEXT, "batch_size": 2, "micro_batch_size": 2},
        optim={"steps": 30, "lr": 1e-2},
        run={"eval_every": 0, "sample_tokens": 0, "checkpoint_every": 30, "eval_tokens": 512},
    )
    router = dataclasses.replace(config.model.moe.router, noisy=False)
    moe = dataclasses.replace(config.model.moe, router=router)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    loop.train(config, log=quiet)
    return root / "run"


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to be"
        time.sleep(0.005)


class Server:
    """`headway serve RUN --port 0 --json` with further flags."""

    def __init__(self, run: Path, *flags: object, log: Path, **environment: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "headway", "serve", run, "--port", 0, "--json", *flags]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        )
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.ready = json.loads(line)
        self.url = self.ready["url"]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, body: object, **more: object) -> httpx.Response:
        return self.http.post(path, json=body, **more)

    def complete(self, **body: object) -> dict:
        """The reply to a body of /v1/completions."""
        reply = self.post("/v1/completions", body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def chat(self, **body: object) -> dict:
        reply = self.post("/v1/chat/completions", body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def events(self, path: str, body: dict) -> list:
        """The events of a stream, parsed; [DONE] must be the last and is left out."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as reply:
            assert reply.status_code == 200, reply.read()
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in reply.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]

    def metric(self, name: str) -> float:
        """The value of a metric."""
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(x.split()[-1]) for x in lines if x.startswith(f"headway_{name} "))

    def wait_for(self, name: str, value: float, seconds: float = 5.0) -> None:
        """Wait until a metric has a value."""
        until(lambda: self.metric(name) == value, seconds)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, dict]:
        """Send a signal; return the exit code and the last line of stdout."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, dict]:
        """Wait for the end."""
        self.http.close()
        out, _ = self.process.communicate(timeout=60)
        assert "Traceback" not in self.log.read_text(), self.log.read_text()
        lines = out.splitlines()
        return self.process.returncode, json.loads(lines[-1]) if lines else {}

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
