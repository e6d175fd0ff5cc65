"""The engine by itself: a second thread, other work on the machine, other requests in the batch.

    python bench/serve_engine.py [--shapes S,M] [--repetitions N] [--requests N] [--work DIR]
                                 [--json] [--save]

Shapes and weights as in bench/serve.py, bfloat16. `threads`: a decoding step of batches 1 and 16
with two threads beside that with one, in turns. `busy`: the same while as many processes as there
are cores count without end, beside its quiet time. `company`: texts of 64 greedy tokens, each
written alone and then all at once; how many of them change, in Transformers (S, bfloat16,
`grouped_mm`) and here.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.serve import SHAPES, Task, prepare, prompts, side_of
from bench.worker import Worker
from headway.config import UsageError

TASKS = (Task(1, 8, 129), Task(16, 8, 65))
THREADS = (1, 2)
N_TOKENS = 64
VARIANT = "bfloat16/grouped_mm"


class OtherWork:
    """Processes that count on every core, while they are let."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "while True: pass"]
        self.processes = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def step_seconds(worker: Worker, task: Task, vocab_size: int, draw: random.Random) -> float:
    """Seconds of one decoding step."""
    first, all_tokens = (
        worker.step({"prompts": prompts(task, vocab_size, draw), "tokens": n})["seconds"]
        for n in (1, task.tokens)
    )
    return (all_tokens - first) / (task.tokens - 1)


def decoding(name: str, run: Path, repetitions: int) -> list[dict]:
    """Rows of steps with one thread and with two, quiet and beside other work."""
    vocab_size, draw, rows = SHAPES[name].vocab_size, random.Random(1), []
    sides, others = {n: side_of("headway", run, threads=n) for n in THREADS}, OtherWork()
    try:
        for task in TASKS:
            seconds: dict[tuple[int, bool], list[float]] = {
                (n, busy): [] for busy in (False, True) for n in THREADS
            }
            for repetition in range(repetitions + 1):
                for (n, busy), values in seconds.items():
                    if busy:
                        with others.running():
                            step = step_seconds(sides[n], task, vocab_size, draw)
                    else:
                        step = step_seconds(sides[n], task, vocab_size, draw)
                    if repetition:  # the first warms up
                        values.append(step)
            for (n, busy), values in seconds.items():
                row = {"shape": name, "task": task.name, "threads": n, "busy": busy}
                rows.append(row | {"seconds": values, "median": statistics.median(values)})
                show(rows[-1])
    finally:
        others.close()
        for worker in sides.values():
            worker.close()
    return rows


def company(folder: Path, n_requests: int) -> list[dict]:
    """How many texts change when they are written together."""
    prepare("S", folder, gguf=False, hf=True)
    draw, vocab_size = random.Random(6), SHAPES["S"].vocab_size
    texts = prompts(Task(n_requests, 16, N_TOKENS), vocab_size, draw)
    sides = {
        "headway": side_of("headway", folder / "hf"),
        f"transformers {VARIANT}": side_of("transformers", folder / "hf"),
    }
    rows = []
    try:
        for side, worker in sides.items():
            request = {"tokens": N_TOKENS, "variant": VARIANT}
            together = worker.step(request | {"prompts": texts})["text"]
            alone = [worker.step(request | {"prompts": [x]})["text"][0] for x in texts]
            changed = sum(a != b for a, b in zip(alone, together, strict=True))
            rows.append(
                {
                    "shape": "S",
                    "task": "company",
                    "side": side,
                    "requests": n_requests,
                    "changed": changed,
                }
            )
            show(rows[-1])
    finally:
        for worker in sides.values():
            worker.close()
    return rows


def show(row: dict) -> None:
    common.print_rows([{k: v for k, v in row.items() if k != "seconds"}])


def targets(rows: list[dict]) -> list[dict]:
    """Ratios of medians."""
    out, times = [], {}
    for row in rows:
        if "threads" in row:
            times[row["shape"], row["task"], row["threads"], row["busy"]] = row["median"]
        elif row["side"] == "headway":
            name = f"texts of {row['requests']} requests that change in company"
            out.append(common.target(name, row["changed"], 0, at_least=False))
    for (shape, task, n, busy), seconds in times.items():
        quiet = times[shape, task, n, False]
        if busy:
            name = f"{shape} {task}, {n} thread{'s' if n > 1 else ''}: speed on busy cores / quiet"
            out.append(common.target(name, quiet / seconds, 0.35, at_least=True))
        elif n == 2:
            name = f"{shape} {task}: time with one thread / with two"
            ratio = times[shape, task, 1, False] / seconds
            out.append(common.target(name, ratio, 1, at_least=True))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser, data=False)
    parser.add_argument("--shapes", default="S,M")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--work", default="", help="folder that keeps the models between calls")
    args = parser.parse_args()
    names, rows = args.shapes.split(","), []
    if unknown := set(names) - set(SHAPES):
        raise UsageError(f"--shapes {sorted(unknown)[0]} is none of {', '.join(SHAPES)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary)
        for name in names:
            prepare(name, work / name, gguf=False, hf=False)
            rows += decoding(name, work / name / "run", args.repetitions)
        if args.requests:
            rows += company(work / "S", args.requests)
    common.report("serve_engine", rows, targets(rows), args)


if __name__ == "__main__":
    common.run(main)
