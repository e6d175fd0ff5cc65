"""Signals that ask a run to end: SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What Ctrl-C, batch systems and a terminal that closes send."""


class Interrupt:
    """A context in which each of `SIGNALS`, however often it comes, is one request to end.

    Launchers send a signal more than once: Slurm to every process of a job, torchrun's agent then
    again to its ranks. Until `defer` there is nothing to save, and the first signal raises
    KeyboardInterrupt; after it a signal only sets `requested`, so that the loop finishes its step
    and saves. A second SIGINT raises KeyboardInterrupt, except below torchrun, which forwards it.

    A SIGHUP that is ignored when the context begins (`nohup`) stays ignored. Outside the main
    thread, where Python takes no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = ""
        """Name of the first signal, such as `SIGINT`; empty until one came."""
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

    def defer(self, collect: Callable[[str], list[str]]) -> None:
        """From now on there is work to save: requests wait for the end of the step.

        `collect` gives the values of all ranks: where one of them was asked to end before all had
        come here, all raise KeyboardInterrupt.
        """
        self._deferred = True
        try:
            names = collect(self.requested)
        except RuntimeError:  # a rank that was asked to end has left
            if not self.requested:
                raise
            names = [self.requested]
        if name := next(filter(None, names), ""):
            raise _nothing_to_save(name)

    def request(self, name: str) -> None:
        """Asks the run to end, as the signal `name` does; only the first request counts. Raises
        KeyboardInterrupt before `defer`."""
        if self.requested:
            return
        self.requested = name
        if not self._deferred:
            raise _nothing_to_save(name)
        if os.environ.get("RANK", "0") == "0":
            more = "" if self._forwarded else "; a second Ctrl-C ends at once"
            # os.write, since a handler may interrupt a print that is under way
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
    """Ignores `SIGNALS` in this process until it ends: a launcher sends them again to ranks that
    are leaving, which would change their exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
