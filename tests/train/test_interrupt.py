"""Requests to end: one, however many signals come, and no step is lost by them."""

import os
import signal
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest

from headway.checkpoint import checkpoint_dir
from headway.cli import main as cli
from headway.train import loop, records, text_data
from headway.train.interrupt import SIGNALS, Interrupt
from tests.command import call
from tests.train.tiny_run import assert_same_run, events, tiny, train

AGAIN = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def raising(*numbers):
    def act():
        for number in numbers:
            signal.raise_signal(number)

    return act


def alone(name):
    return [name]


def at_call(number, inner, act):
    """`inner`, which begins with `act` when it is called for the `number`th time."""
    calls = []

    def patched(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            act()
        return inner(*arguments, **options)

    return patched


def test_signals_that_come_again_are_one_request(whole, tmp_path, monkeypatch, capfd):
    before = [signal.getsignal(number) for number in SIGNALS]
    with monkeypatch.context() as patch:
        first = raising(*AGAIN, *AGAIN, signal.SIGINT)
        patch.setattr(loop, "gradient", at_call(7, loop.gradient, first))
        # while the checkpoint of step 7, the second one, is written, and the report after it
        patch.setattr(checkpoint_dir, "commit", at_call(2, checkpoint_dir.commit, raising(*AGAIN)))
        patch.setattr(records, "write_report", at_call(1, records.write_report, raising(*AGAIN)))
        stopped = train(tiny(tmp_path))
    assert stopped["interrupted"] and stopped["steps"] == 7 and stopped["error"] == ""
    assert stopped["checkpoint"].endswith("step-000007") and stopped["report"]
    assert capfd.readouterr().err == (
        "SIGTERM: finishing this step, then saving; a second Ctrl-C ends at once\n"
    )
    assert [signal.getsignal(number) for number in SIGNALS] == before
    resumed = train(tiny(tmp_path), resume=tmp_path / "run")
    assert events(tmp_path) == [(7, "interrupted"), (7, "resumed")]
    assert_same_run(whole[0], tmp_path, whole[1], resumed)


@pytest.mark.parametrize("how", ["evaluation", "asynchronous save"])
def test_outside_of_a_step(whole, tmp_path, monkeypatch, how):
    config = tiny(tmp_path, run={"async_checkpoint": how == "asynchronous save"})
    with monkeypatch.context() as patch:
        if how == "evaluation":  # the one before step 0
            evaluate = at_call(1, text_data.evaluate, raising(*AGAIN))
            patch.setattr(text_data, "evaluate", evaluate)
        else:
            patch.setattr(
                checkpoint_dir,
                "create_temporary",
                at_call(1, checkpoint_dir.create_temporary, lambda: os.kill(os.getpid(), 15)),
            )
        stopped = train(config)
    steps = stopped["steps"]
    assert stopped["interrupted"] and (steps == 1 if how == "evaluation" else steps >= 4)
    assert checkpoint_dir.latest(tmp_path / "run")[0].name == f"step-{steps:06d}"
    resumed = train(config, resume=tmp_path / "run")
    assert_same_run(whole[0], tmp_path, whole[1], resumed)


@pytest.mark.parametrize("number", AGAIN)
def test_before_the_first_step_there_is_nothing_to_save(place, tmp_path, monkeypatch, number):
    """While text is tokenised; what was written of it goes away."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("HEADWAY_CACHE", str(cache))
    folder = tmp_path / "run"
    words = ("train", f"{place}/tiny.py:tiny", "--run", folder, "--steps", 2)
    prepare = text_data.prepare

    def interrupting(line):
        assert line.startswith("tokenised")  # and not in its place in the cache yet
        raising(number, number)()

    with monkeypatch.context() as patch:
        patch.setattr(text_data, "prepare", lambda *args: prepare(*args[:2], interrupting))
        done = call(*words)
    name = number.name
    assert (done.code, done.err) == (
        130,
        f"headway: {name}: nothing to save yet; the same command starts again\n",
    )
    assert not folder.exists()  # and of the cache only what is tokenised is kept, to go on with
    assert all(path.name.endswith(".parts") for path in cache.iterdir() if path.is_dir())
    assert call(*words).code == 0
    assert not [path for path in cache.iterdir() if path.name.endswith(".parts")]


def test_a_second_ctrl_c_ends_at_once_and_torchrun_sends_no_second_one(monkeypatch):
    with Interrupt() as interrupt:
        interrupt.defer(alone)
        raising(signal.SIGTERM, signal.SIGINT)()
        assert interrupt.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with Interrupt() as interrupt:
        interrupt.defer(alone)
        raising(signal.SIGINT, signal.SIGINT, signal.SIGINT)()
        assert interrupt.requested == "SIGINT"


def test_ranks_of_which_one_was_asked_leave_together():
    """However the request and the ranks' last meeting before step 1 fall."""

    def gone(name):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("connection closed by peer")

    def lost(name):
        raise RuntimeError("connection closed by peer")

    for collect in (gone, lambda name: [name, "SIGTERM"]):
        with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt, match="SIGTERM: nothing"):
            interrupt.defer(collect)
    with Interrupt() as interrupt, pytest.raises(RuntimeError, match="closed by peer"):
        interrupt.defer(lost)


def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.requested == ""
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_leaves_ends_the_run_with_a_checkpoint(place, tmp_path, monkeypatch):
    """As `tee` does, which a Ctrl-C ends too."""
    reading, writing = os.pipe()
    with monkeypatch.context() as patch, open(writing, "w") as pipe:
        patch.setattr(sys, "stdout", pipe)
        patch.setattr(loop, "gradient", at_call(3, loop.gradient, lambda: os.close(reading)))
        code = cli.main(["train", f"{place}/tiny.py:tiny", "--run", str(tmp_path / "run")])
    assert code == 130
    # it evaluates at each step
    assert checkpoint_dir.latest(tmp_path / "run")[0].name == "step-000003"


def test_a_terminal_that_closes(place, tmp_path):
    """SIGHUP, and nobody to print to."""
    ours, theirs = os.openpty()
    words = ["train", f"{place}/tiny.py:tiny", "--run", str(tmp_path / "run"), "--steps", "100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "headway", *words, "--run.eval-every", "100000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: ioctl(theirs, termios.TIOCSCTTY, 0),
    ) as process:
        os.close(theirs)
        with open(ours, "rb", buffering=0) as terminal:
            while b" 6/100000" not in terminal.readline() and process.poll() is None:
                pass
        assert process.wait(60) == 130
    latest, problems = checkpoint_dir.latest(tmp_path / "run")
    assert latest is not None and problems == []
    assert '"SIGHUP at step' in (tmp_path / "run" / "metrics.jsonl").read_text()
