"""Hosts that are network namespaces of this machine, joined by a bridge, each on a link of its own
whose rate can be changed while jobs run.

    host r:  eth0 (10.77.0.r+1) ── veth pair ── bridge

`tc … tbf` (a token bucket) limits both directions of a link at the same rate: inside the namespace
what the host sends, on the bridge's end what it receives. The bridge has no address, so nothing
reaches the machine's own network. Needs Linux, root and iproute2.

Jumbo frames (9,000 bytes) keep headers under 1% of what the counters read. A bucket holds 5 ms of
traffic, and two packets before segmentation (64 KiB each) at least: a packet that is larger than
the bucket, left over from a faster phase, would wait for ever. The queue behind it is so long that
nothing is dropped, as on a network with flow control: hosts that send to the same one wait for each
other. Congestion control is Reno, which a namespace may always choose;
windows are open from the start and stay so.
"""

import contextlib
import ctypes
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from headway.config import UsageError

MTU = 9000
INTERFACE = "eth0"
PREFIX = "headway-"
PR_SET_PDEATHSIG = 1


def why_not() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if sys.platform != "linux":
        return f"network namespaces are there on Linux and this is {sys.platform}"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is missing; install iproute2 (apt-get install iproute2)"
    if os.geteuid() != 0:
        return f"network namespaces need root and this is user {os.geteuid()}; use sudo"
    name = f"{PREFIX}{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"ip netns add fails here ({_first(done.stderr)}); use a machine or a VM of your own"
    _ip("netns", "del", name)
    return ""


def address(rank: int) -> str:
    """Of a host on its link."""
    return f"10.77.0.{rank + 1}"


def sent_and_received() -> tuple[int, int]:
    """Bytes through this host's interface since it was made, by the kernel's own counters."""
    folder = Path("/sys/class/net") / INTERFACE / "statistics"
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


def bucket(mbit: float) -> list[str]:
    """tbf's parameters for a rate in Mbit/s."""
    burst = max(int(mbit * 1e6 / 8 * 0.005), 128 << 10)
    return ["rate", f"{mbit:g}mbit", "burst", str(burst), "limit", str(64 << 20)]


class Hosts:
    """Made by `hosts()`."""

    def __init__(self, size: int) -> None:
        self.size, self.number = size, os.getpid()
        self.bridge = f"hwb{self.number}"

    def name(self, rank: int) -> str:
        """Of a namespace."""
        return f"{PREFIX}{self.number}-{rank}"

    def make(self) -> None:
        """Namespaces, bridge and links."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")
        for rank in range(self.size):
            name, outer = self.name(rank), self._outer(rank)
            _ip("netns", "add", name)
            inner = f"type veth peer name {INTERFACE} netns {name} mtu {MTU}".split()
            _ip("link", "add", outer, "mtu", str(MTU), *inner)
            _ip("link", "set", outer, "master", self.bridge, "up")
            _ip("-n", name, "addr", "add", f"{address(rank)}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            self._tune(name)

    def shape(self, mbit: float | None) -> None:
        """The rate of every link in both directions; None takes the limit away."""
        for rank in range(self.size):
            for where, device in ((["-n", self.name(rank)], INTERFACE), ([], self._outer(rank))):
                change = ["replace", "dev", device, "root"]
                if mbit is None:
                    change += ["pfifo", "limit", "10000"]  # nothing waits in it
                else:
                    change += ["tbf", *bucket(mbit)]
                _call("tc", *where, "qdisc", *change)

    def remove(self) -> None:
        """All of it; what is not there is not missed."""
        for rank in range(self.size):
            _quietly("ip", "netns", "del", self.name(rank))
            _quietly("ip", "link", "del", self._outer(rank))
        _quietly("ip", "link", "del", self.bridge)

    def _outer(self, rank: int) -> str:
        return f"hwv{self.number}r{rank}"

    @staticmethod
    def _tune(name: str) -> None:
        settings = {
            "tcp_congestion_control": "reno",
            "tcp_slow_start_after_idle": "0",
            "tcp_rmem": "4096 4194304 16777216",
            "tcp_wmem": "4096 4194304 16777216",
        }
        for key, value in settings.items():
            path = f"/proc/sys/net/ipv4/{key}"
            _quietly("ip", "netns", "exec", name, "sh", "-c", f"echo {value} > {path}")


@contextlib.contextmanager
def hosts(size: int) -> Iterator[Hosts]:
    """`size` hosts that are gone afterwards, also after Ctrl-C and SIGTERM.

    Raises: UsageError where there can be none.
    """
    if why := why_not():
        raise UsageError(why)
    remove_leftovers()
    created = Hosts(size)
    previous = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        created.make()
        yield created
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning
        created.remove()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for s, handler in previous.items():
            signal.signal(s, handler)


def remove_leftovers() -> list[str]:
    """Namespaces and bridges of runs that were killed outright; their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    dead = [
        line.split()[0]
        for line in listed.splitlines()
        if line.startswith(PREFIX) and not _alive(line.split()[0].split("-")[1])
    ]
    for name in dead:
        _quietly("ip", "netns", "del", name)
    # a link outlives its namespace as long as a process in there takes to die
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    for link, number in re.findall(r"^\d+: (hw(?:b|v)(\d+)(?:r\d)?)[@:]", links, re.MULTILINE):
        if not _alive(number):
            _quietly("ip", "link", "del", link)
    return dead


class Workers:
    """One process on every host that answers commands, a line of JSON each, and dies with the
    process that made it, however that dies."""

    def __init__(self, where: Hosts, command: list[str]) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.errors = [tempfile.TemporaryFile("w+") for _ in range(where.size)]  # noqa: SIM115
        environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        prctl = ctypes.CDLL(None).prctl
        for rank in range(where.size):
            self.processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", where.name(rank), *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.errors[rank],
                    text=True,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is the parent's to handle
                    # between fork and exec: no time in which a worker could outlive this process
                    preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
                )
            )

    def ask(self, commands: list[dict]) -> list[dict]:
        """A command for every host at once; their answers. RuntimeError with the last words of the
        first that failed."""
        for process, command in zip(self.processes, commands, strict=True):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(command) + "\n")
                process.stdin.flush()
        answers: dict[int, dict] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self.processes):
                for ready, _ in selector.select():
                    line = ready.fileobj.readline()  # type: ignore[union-attr]
                    selector.unregister(ready.fileobj)
                    answer = json.loads(line) if line else {"error": self._report(ready.data)}
                    if "error" in answer:  # the others may wait for this one until they time out
                        raise RuntimeError(f"host {ready.data}: {answer['error']}")
                    answers[ready.data] = answer
        return [answers[rank] for rank in range(len(self.processes))]

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for file in self.errors:
            file.close()

    def _report(self, rank: int) -> str:
        self.errors[rank].seek(0)
        return (self.errors[rank].read().strip().splitlines() or ["the process ended"])[-1]


def serve(answer: Callable[[dict], dict[str, Any]]) -> None:
    """The worker's end of `Workers`."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _alive(number: str) -> bool:
    return Path(f"/proc/{number}").exists()


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"`{' '.join(command)}` fails here: {_first(done.stderr)}")


def _quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True)


def _first(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]
