"""Where every rank stands, published in the job's store: who is behind when a collective hangs.

A thread of each rank writes `[step, collectives so far, the last one, a count of beats, ended]`
twice a second and at every step. It costs the training thread nothing, touches no device, and goes
on while that thread waits. A rank that lives and is behind still beats; one that was stopped, or
whose host is gone, does not.
"""

import contextlib
import json
import os
import sys
import threading
import time
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist

from headway.config import RunError
from headway.parallel.traffic import Traffic

BEAT = 0.5
"""Seconds between two beats."""


class Position(NamedTuple):
    """Of one rank."""

    step: int
    calls: int
    """Collectives begun so far."""
    last: str
    """Axis and purpose of the last of them."""
    beats: int
    ended: bool

    @property
    def place(self) -> tuple[int, int]:
        """Comparable: who is behind whom."""
        return self.step, self.calls

    def __str__(self) -> str:
        return f"step {self.step} ({f'in {self.last}' if self.last else 'its start'})"


class Watchdog:
    """Publishes this rank's position; a context around everything that the ranks do together.

    An error of a collective inside it becomes a `RunError` that names the rank at fault, and empty
    on all ranks but one, so that one line is printed. With NCCL the host is not told in time: there
    the thread itself ends a process that has not moved for `timeout` + 5 s while others are behind.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: float, traffic: Traffic
    ) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.traffic = traffic
        self.step = self.beats = 0
        self._ended = False
        self._moved = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def begin_step(self, step: int) -> None:
        """This rank begins a step."""
        self.step = step
        self._moved.set()

    def positions(self) -> dict[int, Position]:
        """Of every rank that has published one."""
        keys = [f"at/{rank}" for rank in range(self.size)]
        there = [rank for rank, key in enumerate(keys) if self.store.check([key])]
        found = self.store.multi_get([keys[rank] for rank in there]) if there else []
        return {r: Position(*json.loads(text)) for r, text in zip(there, found, strict=True)}

    def explain(self, error: BaseException) -> str:
        """One line on a collective that failed: which rank is behind, or gone."""
        self._publish()
        before = self.positions()
        time.sleep(2.5 * BEAT)  # long enough for everyone who lives to beat again
        text = str(error).lower()
        if "timed out" in text or "timeout" in text:
            fate = f"did not join a collective within {self.timeout:g} s"
        else:
            fate = "left the job"
        return who_is_behind(before, self.positions(), fate)

    def claim_report(self) -> bool:
        """Whether this rank is the first that has something to say about the end of the job."""
        return self.store.add("told", 1) == 1

    def __enter__(self) -> "Watchdog":
        self._publish()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, RuntimeError) and _of_a_collective(error):
                raise RunError(self._report(error)) from None
            if error is not None:
                self.claim_report()
        except dist.DistError:  # the store is gone, and with it what could be said here
            return
        finally:
            self._ended = True
            self._moved.set()
            self._thread.join(BEAT * 4)
            self._wait_for_others()

    def _report(self, error: RuntimeError) -> str:
        """`explain`, on one rank; the others give it time, since a launcher ends all when one
        ends."""
        try:
            if self.claim_report():
                text = self.explain(error)
                self.store.set("said", "")
                return text
            deadline = time.monotonic() + 10 * BEAT
            while not self.store.check(["said"]) and time.monotonic() < deadline:
                time.sleep(BEAT / 5)
            time.sleep(BEAT)
            return ""
        except dist.DistError:
            return f"rank {self.rank} is at step {self.step}, and rank 0, which served all, left"

    def _wait_for_others(self) -> None:
        """Rank 0 serves the store where no agent does: it leaves last, if the others leave soon."""
        if self.rank or "TORCHELASTIC_RUN_ID" in os.environ:
            return
        deadline = time.monotonic() + 10 * BEAT
        with contextlib.suppress(dist.DistError):
            while time.monotonic() < deadline:
                if all(p.ended for p in self.positions().values()):
                    return
                time.sleep(BEAT / 10)

    def _publish(self) -> None:
        self.beats += 1
        place = Position(self.step, self.traffic.calls, self.traffic.last, self.beats, self._ended)
        self.store.set(f"at/{self.rank}", json.dumps(place))

    def _beat(self) -> None:
        place, since = (0, 0), time.monotonic()
        try:
            while not self._ended:
                self._moved.wait(BEAT)
                self._moved.clear()
                self._publish()
                now = (self.step, self.traffic.calls)
                if now != place:
                    place, since = now, time.monotonic()
                elif time.monotonic() - since > self.timeout + 5 and not self._ended:
                    self._abort()
                    since = time.monotonic()
                time.sleep(min(BEAT, 5e-5 * self.size))  # the store serves all ranks
            self._publish()
        except dist.DistError:  # the store went away: with rank 0, or with the job
            return

    def _abort(self) -> None:
        """Ends the process where a collective hangs and the host cannot know."""
        found = self.positions()
        if len({p.place for p in found.values()}) == 1:
            return  # something long that all do alike, such as preparing data
        time.sleep(2.5 * BEAT)
        self._publish()
        if self.claim_report():
            fate = f"did not join a collective within {self.timeout:g} s"
            text = who_is_behind(found, self.positions(), fate)
            print(f"headway: {text}", file=sys.stderr, flush=True)
        os._exit(1)


def who_is_behind(before: dict[int, Position], now: dict[int, Position], fate: str) -> str:
    """`rank 2 is at step 7 (in hp scatter) and the others are at step 8 (in hp gather): it …`, from
    two looks at the ranks: those without a beat in between are named, else those behind."""
    front = max(p.place for p in now.values())
    named = [r for r, p in now.items() if not p.ended and p.beats == before[r].beats]
    named = named or [r for r, p in now.items() if p.place < front]
    others = [p for r, p in now.items() if r not in named]
    if not named or not others:
        place = next(iter(now.values()))
        return f"all ranks are at {place}, and one of them {fate}: look at the network between them"
    one = len(named) == 1
    who = f"rank {named[0]} is" if one else f"ranks {', '.join(map(str, named))} are"
    return (
        f"{who} at {now[named[0]]} and the others are at {max(others, key=lambda p: p.place)}: "
        f"{'it' if one else 'they'} {fate}"
    )


def _of_a_collective(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors that name its sources."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
