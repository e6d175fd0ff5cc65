"""The lock of a run folder: one job at a time trains in it.

`RUN/lock.json` names its holder and is created with O_EXCL, which is atomic on every file system
that a cluster uses, NFS included; file locks, which some of them lack or keep to one host, are not
needed. On the machine of the holder the process table says whether it is alive. Elsewhere its
heartbeat does: it touches the file every `HEARTBEAT` seconds, and after `EXPIRY` seconds without
one it counts as gone. Times are compared with those of a new file in the same folder, so the clocks
of the hosts do not matter."""

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

from headway.config import RunError, UsageError, cannot_write

HEARTBEAT = 10.0
"""Seconds between two heartbeats."""
EXPIRY = 60.0
"""Seconds without a heartbeat after which a holder on another machine counts as gone."""


class InUseError(UsageError):
    """A living process holds the lock."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    machine: str
    """The boot of the kernel and the process namespace in which `pid` is valid."""
    pid: int
    born: str
    """Start time of the process, which tells it from a later one with the same pid."""
    token: str
    """Unique to this lock."""

    @classmethod
    def of(cls, pid: int) -> "Holder":
        """Return a process of this machine as the holder of a new lock."""
        return cls(platform.node(), _machine(), pid, _start_time(pid) or "", uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """Context that releases the lock of `run_dir` at its end if `acquire` was called. Another
    `name` is another lock of the same folder."""

    def __init__(self, run_dir: Path, name: str = "lock.json") -> None:
        self.path = run_dir / name
        self._mine = Holder.of(os.getpid())
        self._acquired, self._ended, self._new_holder = False, threading.Event(), ""

    def acquire(self, log: Callable[[str], None]) -> None:
        """Acquire the lock. That of a process that is gone is taken over, which `log` tells. Raises
        InUseError where another process trains in the folder, UsageError where it cannot be
        written."""
        try:
            while not self._create(self.path) and not self._take_over(log):
                time.sleep(0.01)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._acquired = True
        threading.Thread(target=self._heartbeat, daemon=True).start()

    def check(self) -> None:
        """Raise RunError when another job took the lock over, as while this one was suspended."""
        if self._new_holder:
            taken = f"{self.path.parent} was taken over by {self._new_holder}"
            raise RunError(f"{taken}; this job ends")

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._acquired and read_holder(self.path) == self._mine:
            self.path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(asdict(self._mine), file)
        except FileExistsError:
            return False
        return True

    def _take_over(self, log: Callable[[str], None]) -> bool:
        """Take over the lock of a holder that is gone. Return False where the lock has changed
        meanwhile. Raise InUseError where the holder is alive."""
        holder, silence = read_holder(self.path), _age(self.path)
        if silence is None:  # released
            return False
        alive = ""
        if holder is not None and holder.machine == self._mine.machine:
            if _start_time(holder.pid) in (holder.born, ""):
                alive = str(holder)
        elif silence < 3 * HEARTBEAT:
            alive = f"{holder or 'a process'}, {silence:.0f} s ago,"
        elif silence < EXPIRY:
            who = holder or "its process"
            log(f"{self.path.parent}: is {who} gone? silent for {silence:.0f} s")
            time.sleep(EXPIRY / 6)
            return False
        if alive:
            raise InUseError(
                f"{self.path.parent} is in use: {alive} trains in it; wait for its end, or choose "
                "another --run"
            )
        # Of several processes one may replace this holder: the one that creates this file.
        claim = self.path.with_name(f"{self.path.name}.{holder.token if holder else 'torn'}")
        if not self._create(claim):
            # a process that was killed at this point leaves its file
            if (_age(claim) or 0) > EXPIRY:
                claim.unlink(missing_ok=True)
            return False
        if read_holder(self.path) != holder:
            claim.unlink()
            return False
        os.replace(claim, self.path)
        log(f"{holder or 'a process'}, which trained in {self.path.parent}, is gone: taking over")
        return True

    def _heartbeat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            holder = read_holder(self.path)
            if holder is not None and holder != self._mine:
                self._new_holder = str(holder)
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)


def read_holder(path: Path) -> Holder | None:
    """Return the holder that a lock names; None without a lock, or while it is being written."""
    try:
        return Holder(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _age(path: Path) -> float | None:
    """Return the seconds since a file was touched, by its file system's clock; None without it."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        now.write(b"now")
        now.flush()
        try:
            # opened, so that a network file system asks the server and not its cache
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


def _start_time(pid: int) -> str | None:
    """Return the start time of a process of this machine, in ticks since the boot; None when it is
    gone, empty where the system does not say."""
    try:
        with contextlib.suppress(PermissionError):  # of another user
            os.kill(pid, 0)
    except ProcessLookupError:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended
