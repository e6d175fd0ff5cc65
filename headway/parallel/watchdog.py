"""Watchdog: every rank publishes its position in the job's store, to name the rank that hangs.

A thread of each rank writes `[step, collectives so far, the last one, heartbeats so far, ended]`
twice a second and at every step. It costs the training thread nothing, touches no device, and runs
while that thread is blocked. A rank that is alive and behind still has a heartbeat; one that was
stopped, or whose host is gone, has none."""

import contextlib
import json
import os
import sys
import threading
import time
from typing import NamedTuple

import torch.distributed as dist

from headway.config import RunError
from headway.parallel.traffic import Traffic

HEARTBEAT = 0.5
"""Seconds between two heartbeats."""


class Position(NamedTuple):
    """The position of one rank."""

    step: int
    calls: int
    """Collectives issued so far."""
    last: str
    """Axis and purpose of the last of them."""
    heartbeats: int
    ended: bool

    @property
    def progress(self) -> tuple[int, int]:
        """The part that shows which rank is behind; comparable."""
        return self.step, self.calls

    def __str__(self) -> str:
        return f"step {self.step} ({f'in {self.last}' if self.last else 'its start'})"


class Watchdog:
    """Publishes this rank's position; a context around everything that the ranks do together.

    An error of a collective inside it becomes a `RunError` that names the rank at fault; its text
    is empty on all ranks but one, so that one line is printed. With NCCL the host learns of errors
    too late: there the thread itself ends a process that has made no progress for `timeout` + 5 s
    while others are behind."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: float, traffic: Traffic
    ) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.traffic = traffic
        self._late = f"did not join a collective within {timeout:g} s"
        self.step = self.heartbeats = 0
        self._ended = False
        self._progressed = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat_loop, daemon=True)

    def begin_step(self, step: int) -> None:
        """Publish that this rank begins a step."""
        self.step = step
        self._progressed.set()

    def positions(self) -> dict[int, Position]:
        """Return the position of every rank that has published one."""
        ranks = [rank for rank in range(self.size) if self.store.check([f"at/{rank}"])]
        texts = self.store.multi_get([f"at/{rank}" for rank in ranks]) if ranks else []
        return {r: Position(*json.loads(text)) for r, text in zip(ranks, texts, strict=True)}

    def explain(self, error: BaseException) -> str:
        """Return one line on a collective that failed: which rank is behind, or gone."""
        self._publish()
        before = self.positions()
        time.sleep(2.5 * HEARTBEAT)  # long enough for another heartbeat of every rank that is alive
        text = str(error).lower()
        fate = self._late if "timed out" in text or "timeout" in text else "left the job"
        return who_is_behind(before, self.positions(), fate)

    def claim_report(self) -> bool:
        """Return whether this rank is the first to report on the end of the job."""
        return self.store.add("told", 1) == 1

    def __enter__(self) -> "Watchdog":
        self._publish()
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            if isinstance(error, RuntimeError) and _is_collective_error(error):
                raise RunError(self._report(error)) from None
            if error is not None:
                self.claim_report()
        except dist.DistError:  # the store is gone, and with it the positions
            return
        finally:
            self._ended = True
            self._progressed.set()
            self._thread.join(HEARTBEAT * 4)
            self._wait_for_others()

    def _report(self, error: RuntimeError) -> str:
        """Return `explain()` on one rank and "" on the others, which give it time: a launcher ends
        all ranks when one ends."""
        try:
            if self.claim_report():
                text = self.explain(error)
                self.store.set("said", "")
                return text
            deadline = time.monotonic() + 10 * HEARTBEAT
            while not self.store.check(["said"]) and time.monotonic() < deadline:
                time.sleep(HEARTBEAT / 5)
            time.sleep(HEARTBEAT)
            return ""
        except dist.DistError:
            return f"rank {self.rank} is at step {self.step}, and rank 0, which served all, left"

    def _wait_for_others(self) -> None:
        """Without a torchrun agent rank 0 hosts the store: wait up to 5 s for the others to end."""
        if self.rank or "TORCHELASTIC_RUN_ID" in os.environ:
            return
        deadline = time.monotonic() + 10 * HEARTBEAT
        with contextlib.suppress(dist.DistError):
            while time.monotonic() < deadline:
                if all(p.ended for p in self.positions().values()):
                    return
                time.sleep(HEARTBEAT / 10)

    def _publish(self) -> None:
        self.heartbeats += 1
        position = Position(
            self.step, self.traffic.calls, self.traffic.last, self.heartbeats, self._ended
        )
        self.store.set(f"at/{self.rank}", json.dumps(position))

    def _heartbeat_loop(self) -> None:
        progress, since = (0, 0), time.monotonic()
        try:
            while not self._ended:
                self._progressed.wait(HEARTBEAT)
                self._progressed.clear()
                self._publish()
                now = (self.step, self.traffic.calls)
                if now != progress:
                    progress, since = now, time.monotonic()
                elif time.monotonic() - since > self.timeout + 5 and not self._ended:
                    self._abort()
                    since = time.monotonic()
                time.sleep(min(HEARTBEAT, 5e-5 * self.size))  # the store serves all ranks
            self._publish()
        except dist.DistError:  # the store went away: with rank 0, or with the job
            return

    def _abort(self) -> None:
        """End the process if a collective hangs, which the host would not notice."""
        before = self.positions()
        if len({p.progress for p in before.values()}) == 1:
            return  # something long that all ranks do, such as preparing data
        time.sleep(2.5 * HEARTBEAT)
        self._publish()
        if self.claim_report():
            text = who_is_behind(before, self.positions(), self._late)
            print(f"headway: {text}", file=sys.stderr, flush=True)
        os._exit(1)


def who_is_behind(before: dict[int, Position], now: dict[int, Position], fate: str) -> str:
    """Return `rank 2 is at step 7 (in hp scatter) and the others are at step 8 (in …): it …`. Of
    the positions at two times, ranks without a heartbeat in between are named, else those
    behind."""
    front = max(p.progress for p in now.values())
    named = [r for r, p in now.items() if not p.ended and p.heartbeats == before[r].heartbeats]
    named = named or [r for r, p in now.items() if p.progress < front]
    others = [p for r, p in now.items() if r not in named]
    if not named or not others:
        where = f"all ranks are at {next(iter(now.values()))}"
        return f"{where}, and one of them {fate}: look at the network between them"
    one = len(named) == 1
    who = f"rank {named[0]} is" if one else f"ranks {', '.join(map(str, named))} are"
    return (
        f"{who} at {now[named[0]]} and the others are at {max(others, key=lambda p: p.progress)}: "
        f"{'it' if one else 'they'} {fate}"
    )


def _is_collective_error(error: RuntimeError) -> bool:
    """Gloo raises plain RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
