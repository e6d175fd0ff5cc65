"""The workers of a process that wants runs: a queue on disk, and processes that train its runs.

ROOT/queues/HOST-PID has the hashes of the runs that a process wants, a line each; its workers
(lab.worker) train those in that order, beside the workers of other queues of the folder: a run is
whose lease it is. What a run consists of is in its folder (lab.folder), so that a queue that is
left behind by a process that was killed is of no importance. No PyTorch."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from platform import node
from typing import Literal

from headway.config import RunError, UsageError, cannot_write
from headway.lab.folder import TRIES, Wanted, add_error, errors, held_by, read_result, tries, want

COMMAND = [sys.executable, "-m", "headway.lab.worker"]
"""Starts a worker, before the path of its queue."""
Place = Literal["here", "ray"]
"""Where workers run: on this machine, or on the nodes of a Ray cluster (lab.ray_workers)."""


@dataclass
class Processes:
    """Context of the workers of a queue on this machine, which are ended at its end."""

    queue: Path
    threads: int
    """Of a worker, until a run says otherwise."""
    log: Callable[[str], None] = print
    _processes: list[subprocess.Popen] = field(default_factory=list)
    pids: set[int] = field(default_factory=lambda: {os.getpid()})
    """Of this process and of all that were started."""
    _lost: int = 0
    """Workers that died without a run."""

    @property
    def root(self) -> Path:
        """The folder of runs/."""
        return self.queue.parent.parent

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()

    def keep(self, n: int, open_: Iterable[str]) -> None:
        """Start workers until there are `n`, also in place of those that have died.

        Args:
            open_: the runs that have not ended.
        Raises: RunError where several died that had no run, as the next would."""
        for process in [p for p in self._processes if p.poll() is not None]:
            self._processes.remove(process)
            self._bury(process.pid, process.returncode, open_)
        while len(self._processes) < n:
            self._processes.append(self.start([*COMMAND, str(self.queue)]))
            self.pids.add(self._processes[-1].pid)

    def start(self, command: list[str], stdout: int | None = None) -> subprocess.Popen:
        """Start a process that imports what this one can; what it prints is in workers.log."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with (self.root / "workers.log").open("ab") as log:
            stdin, out = subprocess.DEVNULL, stdout or log
            return subprocess.Popen(command, env=environment, stdin=stdin, stdout=out, stderr=log)

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
            check_room(self.root)
            log = self.root / "workers.log"
            last = (log.read_text("utf-8", errors="replace").splitlines() or [""])[-1]
            raise RunError(
                f"{self._lost} workers ended ({code}) while they trained nothing; {log} ends in: "
                f"{last}"
            )


@dataclass
class Workers:
    """Context of a queue and of the workers that train its runs. Raises UsageError where the folder
    cannot be written, and where there is no Ray cluster that sees it."""

    root: Path
    n: int
    threads: int = 1
    on: Place = "here"
    log: Callable[[str], None] = print
    _launcher: subprocess.Popen | None = None

    def __post_init__(self) -> None:
        self.queue = self.root.absolute() / "queues" / f"{node()}-{os.getpid()}"
        self._processes = Processes(self.queue, self.threads, self.log)

    def __enter__(self) -> "Workers":
        if self.on == "ray" and importlib.util.find_spec("ray") is None:
            raise UsageError("--on ray needs Ray: pip install 'headway[cluster]'")
        try:
            for folder in (self.root / "runs", self.queue.parent):
                folder.mkdir(parents=True, exist_ok=True)
            self.queue.write_text("", "utf-8")
            if self.on == "ray":
                self._launcher = self._launched()
        except OSError as error:
            raise cannot_write(self.root, error) from None
        except UsageError:
            self.queue.unlink()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.queue.unlink(missing_ok=True)  # ends the workers on other nodes
        with self._processes:
            if self._launcher is not None:
                self._launcher.wait()

    def ask(self, key: str, run: Wanted) -> bool:
        """Ask for a run; return False where no other process can train it, since its edit cannot be
        imported (`lab.edits`)."""
        if not want(self.root, key, run):
            return False
        try:
            with self.queue.open("a", encoding="utf-8") as file:
                file.write(f"{key}\n")
        except OSError as error:
            raise cannot_write(self.root, error) from None
        return True

    def trained(self, key: str) -> bool:
        """Return whether processes of this machine that are known here made all tries of a run."""
        return all(
            host == node() and pid in self._processes.pids
            for host, pid in tries(self.root / "runs" / key)
        )

    def keep(self, open_: list[str]) -> None:
        """Start workers, n or as many as there are open runs, also in place of those that have
        died. Raises RunError where several died that had no run, or where Ray is gone."""
        if self._launcher is None:
            self._processes.keep(min(self.n, len(open_)), open_)
        elif (code := self._launcher.poll()) is not None:
            raise RunError(
                f"the workers on Ray have ended ({code}; see the end of {self.root}/workers.log); "
                "what is trained is kept: call again, with or without --on ray"
            )

    def _launched(self) -> subprocess.Popen:
        """Return the process that keeps workers on Ray's nodes. Raises UsageError for what it
        says."""
        words = [str(self.queue), str(self.n), str(self.threads)]
        command = [sys.executable, "-m", "headway.lab.ray_workers", *words]
        launcher = self._processes.start(command, subprocess.PIPE)
        assert launcher.stdout is not None
        said = launcher.stdout.readline().decode().strip()
        if said != "ready":
            launcher.wait()
            raise UsageError(said or f"--on ray: the end of {self.root}/workers.log says why")
        return launcher


def check_room(root: Path) -> None:
    """Raise UsageError where a folder cannot be written: what a worker says is lost there too."""
    path = root / f".room-{os.getpid()}"
    try:
        path.write_bytes(b"room")
    except OSError as error:
        raise cannot_write(root, error) from None
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def wanted(queue: Path, ended: set[str]) -> Iterator[Path]:
    """Yield the folders of the runs of a queue that are neither finished nor given up, in the order
    in which they were asked for, none once the queue is gone; `ended` remembers the others."""
    try:
        text = queue.read_text("utf-8")
    except FileNotFoundError:
        return
    for line in text.splitlines(keepends=True):
        key, folder = line.strip(), queue.parent.parent / "runs" / line.strip()
        if key in ended or not line.endswith("\n"):  # written in part
            continue
        if read_result(folder) is not None or len(errors(folder)) >= TRIES:
            ended.add(key)
        else:
            yield folder
