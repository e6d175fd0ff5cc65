"""One job at a time in a run folder, whatever became of the one before."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from headway.checkpoint import lock as module
from headway.checkpoint.lock import Holder, Lock
from headway.config import RunError, UsageError
from tests.command import call
from tests.train.tiny_run import assert_same_run, tiny, train


def leave(folder, holder, age=0.0):
    """A lock file as `holder` would have left it, last touched `age` seconds ago."""
    folder.mkdir(exist_ok=True)
    path = folder / "lock.json"
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture(scope="module")
def other():
    """A process that lives, and one that was killed: as holders."""
    living, killed = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    holders = [Holder.of(process.pid) for process in (living, killed)]
    killed.kill()
    killed.wait()
    yield holders
    living.kill()
    living.wait()


def test_a_second_job_gets_one_line_and_changes_nothing(whole, tmp_path):
    """Whether it begins anew, resumes or clears the run."""
    run, told = tmp_path / "run", []
    (tmp_path / "recipe.py").write_text(
        "import pathlib\n"
        "from tests.train.tiny_run import tiny as base\n"
        "def tiny():\n    return base(pathlib.Path(__file__).parent)\n"
    )
    new = ("train", f"{tmp_path}/recipe.py:tiny")

    def log(line):
        if line.startswith("step  9/20"):
            for words in (new, (*new, "--overwrite"), ("train", "--resume", run)):
                told.append(call(*words))

    result = train(tiny(tmp_path), log=log)
    for done in told:
        assert done.code == 2 and done.err.count("\n") == 1
        assert done.err.startswith(f"headway: {run} is in use: process {os.getpid()} on ")
    assert len(told) == 3
    assert_same_run(whole[0], tmp_path, whole[1], result)
    assert not (run / "lock.json").exists()
    assert train(tiny(tmp_path), resume=run)["steps"] == 20


def test_the_lock_of_a_killed_job_is_taken_over_with_a_line(whole, tmp_path, other):
    config, run = tiny(tmp_path), tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train(config, log=lambda line: 1 / (not line.startswith("step  9/20")))
    assert not (run / "lock.json").exists()
    holder = other[1]
    leave(run, holder)
    lines = []
    result = train(config, resume=run, log=lines.append)
    assert (
        f"process {holder.pid} on {holder.host}, which trained in {run}, is gone: taking over"
        in lines
    )
    assert_same_run(whole[0], tmp_path, whole[1], result)


def test_the_process_table_decides_on_this_machine(tmp_path, other):
    living, killed = other
    for holder in (living, dataclasses.replace(living, host="renamed")):
        leave(tmp_path, holder, age=1e6)  # suspended for days, and yet there
        with Lock(tmp_path) as lock, pytest.raises(UsageError, match=f"process {living.pid} on"):
            lock.acquire(print)
    for holder in (killed, dataclasses.replace(living, born="1")):  # another one with its number
        leave(tmp_path, holder)
        with Lock(tmp_path) as lock:
            lock.acquire(print)
            assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_signs_of_life_decide_on_another_machine(tmp_path, other, monkeypatch):
    """Also for a lock that a crash left half written."""
    far = dataclasses.replace(other[1], host="far", machine="another boot")
    leave(tmp_path, far, age=5)
    with Lock(tmp_path) as lock, pytest.raises(UsageError, match="in use: process .* on far, 5 s"):
        lock.acquire(print)
    leave(tmp_path, far).write_text('{"host": ')
    with Lock(tmp_path) as lock, pytest.raises(UsageError, match="in use: a process, 0 s ago"):
        lock.acquire(print)
    for text in (None, '{"host": '):
        path = leave(tmp_path, far)
        if text is not None:
            path.write_text(text)
        os.utime(path, (time.time() - 61,) * 2)
        lines = []
        with Lock(tmp_path) as lock:
            lock.acquire(lines.append)
        assert len(lines) == 1 and lines[0].endswith("is gone: taking over")
    # between three beats and EXPIRY: watched until it beats or does not
    monkeypatch.setattr(module, "EXPIRY", 0.3)
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    leave(tmp_path, far, age=0.2)
    with Lock(tmp_path) as lock:
        lock.acquire(lines.append)
    leave(tmp_path, far, age=0.2)
    beat = threading.Timer(0.02, lambda: os.utime(tmp_path / "lock.json"))
    beat.start()
    with Lock(tmp_path) as lock, pytest.raises(UsageError, match="on far"):
        lock.acquire(lines.append)
    beat.join()


def test_a_holder_shows_life_and_notices_a_successor(tmp_path, other, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT", 0.02)
    with Lock(tmp_path) as lock:
        lock.acquire(print)
        os.utime(lock.path, (0, 0))
        until(lambda: lock.path.stat().st_mtime > 0)
        lock.check()
        leave(tmp_path, other[0])

        def noticed():
            try:
                lock.check()
            except RunError as error:
                assert f"taken over by process {other[0].pid} on" in str(error)
                return True

        until(noticed)
    assert (tmp_path / "lock.json").exists()  # it is not ours to give back


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


TAKERS = """
import pathlib, sys, time
from headway.config import UsageError
from headway.checkpoint.lock import Lock
folder = pathlib.Path(sys.argv[1])
for round in range(40):
    here = folder / str(round)
    while not (here / "go").exists():
        time.sleep(0.0005)
    with Lock(here) as lock:
        try:
            lock.acquire(lambda line: None)
            (here / f"won-{sys.argv[2]}").touch()
        except UsageError:
            (here / f"lost-{sys.argv[2]}").touch()
        while len(list(here.glob("[wl]*-*"))) < 3:
            time.sleep(0.0005)
"""


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path, other):
    command = [sys.executable, "-c", TAKERS, str(tmp_path)]
    for round in range(40):
        leave(tmp_path / str(round), other[1])
    takers = [subprocess.Popen([*command, str(i)]) for i in range(3)]
    for round in range(40):
        (tmp_path / str(round) / "go").touch()
        until(lambda here=tmp_path / str(round): len(list(here.glob("[wl]*-*"))) == 3)
        assert len(list((tmp_path / str(round)).glob("won-*"))) == 1
    assert [taker.wait() for taker in takers] == [0, 0, 0]
