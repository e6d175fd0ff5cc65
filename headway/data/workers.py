"""Processes of this machine that tokenise the units of a source (`parts.work`).

They are started as `python -m headway.data.workers` rather than by `multiprocessing`, which would
import the user's script again, or fork a process in which PyTorch has threads. A worker gets its
job from its stdin, and ends when that is closed, thus however its parent ends; signals are for the
parent alone. It prints a line of JSON for every batch of text."""

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from headway.config import UsageError
from headway.data.files import BadData
from headway.data.parts import Job, Tell, work

STARTING_BYTES = 8 << 20
"""A process is worth starting for so many bytes of text."""


def count(asked: int, job: Job) -> int:
    """Return how many processes tokenise: `data.workers`, or as many cores of this one as pay."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    wanted = asked or min(cores, sum(unit.bytes for unit in job.units) // STARTING_BYTES)
    return max(min(wanted, len(job.units)), 1)


def run(job: Job, n: int, tell: Tell, idle: Callable[[], None]) -> None:
    """Run `parts.work` in `n` processes; `idle` is called at least every second. An error of any of
    them ends all. Raise UsageError too for one that was killed."""
    if n == 1:

        def told(size: int) -> None:
            tell(size)
            idle()

        work(job, told)
        return
    lines: queue.Queue[tuple[int, str]] = queue.Queue()
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_started(pickle.dumps(job), i, lines)) for i in range(n)]
        running = n
        while running:
            idle()
            try:
                i, line = lines.get(timeout=1.0)
            except queue.Empty:
                continue
            if line:
                said = json.loads(line)
                if "error" in said:
                    raise (BadData if said["bad"] else UsageError)(said["error"])
                tell(said["bytes"])
                continue
            running -= 1
            if code := workers[i].wait():
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                fix = "if memory is short, set data.workers to a lower number"
                raise UsageError(f"a process that tokenises ended by {how}; {fix}; run again")


@contextlib.contextmanager
def _started(
    job: bytes, number: int, lines: queue.Queue[tuple[int, str]]
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker whose lines go to a queue, an empty one at its end; end it with the body."""
    place = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "0"}
    command = [sys.executable, "-m", __name__]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=place)
    assert worker.stdin and worker.stdout

    def listen(stdout=worker.stdout) -> None:
        for line in stdout:
            lines.put((number, line.decode()))
        lines.put((number, ""))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # how it ended is said by its exit code
            worker.stdin.write(len(job).to_bytes(8, "little") + job)
            worker.stdin.flush()
        yield worker
    finally:
        worker.kill()
        worker.wait()
        listener.join()
        worker.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()


def main() -> None:
    """Run one worker process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    job = pickle.loads(sys.stdin.buffer.read(size))

    def orphaned() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    def say(**line: object) -> None:
        print(json.dumps(line), flush=True)

    threading.Thread(target=orphaned, daemon=True).start()
    try:
        work(job, lambda size: say(bytes=size))
    except UsageError as error:
        say(error=str(error), bad=isinstance(error, BadData))
    os._exit(0)  # the thread that waits for the parent holds stdin


if __name__ == "__main__":
    main()
