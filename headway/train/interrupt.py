"""Signals that request the end of a run: SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Sent by Ctrl-C, by batch systems and by a terminal that closes."""


class Interrupt:
    """A context in which `SIGNALS`, however many arrive, are one request to end the run.

    Launchers send a signal more than once: Slurm to every process of a job, torchrun's agent then
    again to its ranks. Before `defer` there is nothing to save, and the first signal raises
    KeyboardInterrupt; after it a signal only sets `requested`, so that the loop finishes its step
    and saves. A second SIGINT raises KeyboardInterrupt, except under torchrun, which forwards it.

    A SIGHUP that is ignored when the context begins (`nohup`) stays ignored. Outside the main
    thread, where Python allows no handlers, nothing is changed."""

    def __init__(self) -> None:
        self.requested = ""
        """Name of the first signal, such as `SIGINT`; empty before there was one."""
        self._deferred = self._twice = False
        self._forwarded = "TORCHELASTIC_RUN_ID" in os.environ
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                hup = number == signal.SIGHUP
                if not (hup and signal.getsignal(number) is signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def defer(self, gather: Callable[[str], list[str]]) -> None:
        """Defer requests to the end of the step from now on, since there is work to save.

        Args:
            gather: returns the values of all ranks. Where one of them received a request before
                all had reached this call, all raise KeyboardInterrupt.
        """
        self._deferred = True
        try:
            names = gather(self.requested)
        except RuntimeError:  # a rank with a request has ended
            if not self.requested:
                raise
            names = [self.requested]
        if name := next(filter(None, names), ""):
            raise _nothing_to_save(name)

    def request(self, name: str) -> None:
        """Request the end of the run, as the signal `name` does; only the first request counts.
        Raises KeyboardInterrupt before `defer`."""
        if self.requested:
            return
        self.requested = name
        if not self._deferred:
            raise _nothing_to_save(name)
        if os.environ.get("RANK", "0") == "0":
            more = "" if self._forwarded else "; a second Ctrl-C ends at once"
            # os.write, since a handler may interrupt a print
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"{name}: finishing this step, then saving{more}\n".encode())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self._forwarded:
            if self._twice:
                raise KeyboardInterrupt
            self._twice = True
        self.request(signal.Signals(number).name)


def _nothing_to_save(name: str) -> KeyboardInterrupt:
    return KeyboardInterrupt(f"{name}: nothing to save yet; the same command starts again")


def ignore() -> None:
    """Ignore `SIGNALS` in this process until it ends: a launcher sends them again to ranks that are
    ending, which would change their exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
