"""Ctrl-C and SIGTERM: the first one asks for an orderly end, the second one is the system's own."""

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context in which the first SIGINT or SIGTERM only sets `requested`.

    The handlers that were there before come back at once, so a second Ctrl-C raises
    KeyboardInterrupt and a second SIGTERM ends the process. Outside the main thread, where Python
    takes no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = ""
        """Name of the signal, such as `SIGINT`; empty until one came."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()
        # os.write, since a handler may interrupt a print that is under way.
        text = f"{self.requested}: finishing this step, then saving; once more ends at once\n"
        os.write(2, text.encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
