"""The lock of a run folder: one job at a time trains in it.

`RUN/lock.json` names its holder and is made with O_EXCL, which is atomic on every file system that
a cluster uses, NFS included; file locks, which some of them lack or keep to one host, are not
needed. On the machine of the holder the process table says whether it lives. Elsewhere its signs of
life do: it touches the file every `BEAT` seconds, and after `SILENCE` seconds it counts as gone.
Times are compared with those of a new file in the same folder, so clocks of hosts do not matter.
"""

import contextlib
import json
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from headway.config import RunError, UsageError

BEAT = 10.0
"""Seconds between two signs of life."""
SILENCE = 60.0
"""Seconds without one after which a holder on another machine counts as gone."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    machine: str
    """Where its `pid` means something: boot of the kernel and namespace of processes."""
    pid: int
    born: str
    """When the process began, which tells it from a later one with its number."""
    token: str
    """Of this one lock."""

    @classmethod
    def of(cls, pid: int) -> "Holder":
        """A process of this machine as the holder of a new lock."""
        return cls(platform.node(), _machine(), pid, _born(pid) or "", uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """A context that gives the lock of `run_dir` back at its end, where `take` was called."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock.json"
        self._mine = Holder.of(os.getpid())
        self._held, self._ended, self._taken = False, threading.Event(), ""

    def take(self, log: Callable[[str], None]) -> None:
        """Takes the lock, also that of a process that is gone, which `log` then tells.

        Raises UsageError where another process trains in the folder or it cannot be written.
        """
        try:
            while not self._create(self.path) and not self._succeed(log):
                time.sleep(0.01)
        except OSError as error:
            raise UsageError(
                f"cannot write {self.path}: {error.strerror}; choose another folder with --run"
            ) from None
        self._held = True
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raises RunError when another job has taken the lock, as while this one was suspended."""
        if self._taken:
            raise RunError(f"{self.path.parent} was taken over by {self._taken}; this job ends")

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._held and _read(self.path) == self._mine:
            self.path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(asdict(self._mine), file)
        except FileExistsError:
            return False
        return True

    def _succeed(self, log: Callable[[str], None]) -> bool:
        """Takes the lock of a holder that is gone. False where the lock has changed meanwhile.
        Raises UsageError where the holder lives."""
        holder, silence = _read(self.path), _silence(self.path)
        if silence is None:  # given back
            return False
        if holder is not None and holder.machine == self._mine.machine:
            if _born(holder.pid) in (holder.born, ""):
                raise self._in_use(str(holder))
        elif silence < SILENCE:
            if silence < 3 * BEAT:
                raise self._in_use(f"{holder or 'a process'}, {silence:.0f} s ago,")
            log(
                f"{self.path.parent}: is {holder or 'its process'} gone? silent for {silence:.0f} s"
            )
            time.sleep(SILENCE / 6)
            return False
        # Of several processes one may replace this holder: the one that makes this file.
        claim = self.path.with_name(f"{self.path.name}.{holder.token if holder else 'torn'}")
        if not self._create(claim):
            if (_silence(claim) or 0) > SILENCE:  # left by a process killed at this point
                claim.unlink(missing_ok=True)
            return False
        if _read(self.path) != holder:
            claim.unlink()
            return False
        os.replace(claim, self.path)
        log(f"{holder or 'a process'}, which trained in {self.path.parent}, is gone: taking over")
        return True

    def _in_use(self, who: str) -> UsageError:
        return UsageError(
            f"{self.path.parent} is in use: {who} trains in it; wait for its end, or choose "
            "another --run"
        )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            holder = _read(self.path)
            if holder is not None and holder != self._mine:
                self._taken = str(holder)
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _read(path: Path) -> Holder | None:
    """The holder that a lock names; None where there is no lock, or one that is being written."""
    try:
        return Holder(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _silence(path: Path) -> float | None:
    """Seconds since a file was touched, by the clock of its file system; None without it."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        now.write(b"now")
        now.flush()
        try:
            # opened: a network file system asks the server then, instead of its own memory
            with path.open("rb") as file:
                return os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return platform.node()


def _born(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the boot; None when it is gone, empty
    where the system does not tell."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # somebody else's
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]  # a zombie runs no more
