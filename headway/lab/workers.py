"""The workers of a process that wants runs: a queue on disk, and processes that train its runs.

ROOT/queues/HOST-PID has the hashes of the runs that a process wants, a line each; its workers
(lab.worker) train those in that order, beside the workers of other queues of the folder: a run is
whose lease it is. What a run consists of is in its folder (lab.folder), so that a queue that is
left behind by a process that was killed is of no importance. No PyTorch."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from platform import node
from typing import Any

from headway.config import Config, RunError, cannot_write
from headway.lab.folder import TRIES, add_error, errors, held_by, want

COMMAND = [sys.executable, "-m", "headway.lab.worker"]
"""Starts a worker, before the path of its queue."""


@dataclass
class Workers:
    """Context of worker processes that train what is asked for. Raises UsageError where the folder
    cannot be written."""

    root: Path
    threads: int = 1
    """Of a worker, until a run says otherwise."""
    log: Callable[[str], None] = print
    _processes: list[subprocess.Popen] = field(default_factory=list)
    _lost: int = 0
    """Workers that died without a run."""

    @property
    def queue(self) -> Path:
        """The file with the runs that this process wants."""
        return self.root / "queues" / f"{node()}-{os.getpid()}"

    def __enter__(self) -> "Workers":
        try:
            for folder in (self.root / "runs", self.queue.parent):
                folder.mkdir(parents=True, exist_ok=True)
            self.queue.write_text("", "utf-8")
        except OSError as error:
            raise cannot_write(self.root, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
        self.queue.unlink(missing_ok=True)

    def ask(self, key: str, config: Config, edit: Callable[..., Any] | None = None) -> bool:
        """Ask for a run; return False where no other process can train it, since its edit cannot be
        imported (`lab.edits`)."""
        if not want(self.root, key, config, edit):
            return False
        try:
            with self.queue.open("a", encoding="utf-8") as file:
                file.write(f"{key}\n")
        except OSError as error:
            raise cannot_write(self.root, error) from None
        return True

    def keep(self, n: int, open_: Iterable[str]) -> None:
        """Start workers until there are `n`, also in place of those that have died.

        Args:
            open_: the runs that have not ended.
        Raises: RunError where several died that had no run, as the next would."""
        for process in [p for p in self._processes if p.poll() is not None]:
            self._processes.remove(process)
            self._bury(process.pid, process.returncode, open_)
        while len(self._processes) < n:
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(self.threads),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # edits are imported
            }
            with (self.root / "workers.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [*COMMAND, str(self.queue)],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )

    def _bury(self, pid: int, code: int, open_: Iterable[str]) -> None:
        """Count the end of a worker, which never ends by itself, as a failure of the run that it
        trained: one that takes too much memory must not be started for ever."""
        for key in open_:
            folder = self.root / "runs" / key
            if (holder := held_by(folder)) and holder.pid == pid and holder.host == node():
                self.log(f"a worker ended with {code} while it trained {key}")
                add_error(folder, f"its worker ended with {code}")
                return
        self._lost += 1
        if self._lost >= TRIES:
            raise RunError(
                f"{self._lost} workers ended ({code}) while they trained nothing; the end of "
                f"{self.root}/workers.log says why"
            )


def wanted(queue: Path, ended: set[str]) -> Iterator[Path]:
    """Yield the folders of the runs of a queue that are neither finished nor given up, in the order
    in which they were asked for; `ended` remembers the others."""
    for line in queue.read_text("utf-8").splitlines(keepends=True):
        key, folder = line.strip(), queue.parent.parent / "runs" / line.strip()
        if key in ended or not line.endswith("\n"):  # written in part
            continue
        if (folder / "result.json").is_file() or len(errors(folder)) >= TRIES:
            ended.add(key)
        else:
            yield folder
