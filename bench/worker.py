"""A rival in a process of its own that makes a step when asked to: rivals take turns, each with its
own memory.

The parent writes a line, the worker makes a step and answers with a line of JSON. A waiting worker
uses no CPU.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class Worker:
    """The parent's end."""

    def __init__(self, command: list[str]):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def step(self, request: object = None) -> dict:
        """What one step returns, for a request that is JSON or none, and its peak memory so far.
        RuntimeError with the worker's last words.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith("{"):  # what processes of a rival print is no answer
                return json.loads(line)
        self.errors.seek(0)
        raise RuntimeError((self.errors.read().strip().splitlines() or ["the worker ended"])[-1])

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.errors.close()


def work(make: Callable[[], Callable[..., dict]]) -> None:
    """The worker's end, after its imports: build the rival, then call it once per line of the
    input, with its request, or with 0, 1, … where there is none.

    Adds `peak_mib`, the peak resident size above that after the imports, and `absolute_peak_mib`,
    the whole of it.
    """
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    before = resident("VmRSS")
    step = make()
    for i, line in enumerate(sys.stdin):
        request = json.loads(line)
        made = step(i if request is None else request)
        peak = resident("VmHWM")
        print(
            json.dumps(made | {"peak_mib": peak - before, "absolute_peak_mib": peak}),
            file=out,
            flush=True,
        )


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB. (getrusage's maximum would inherit the parent's.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {field} in /proc/self/status")
