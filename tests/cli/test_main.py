"""The command itself: help, version, exit codes, threads."""

import os
import sys

import pytest

from headway.cli import main as cli
from tests.command import call


def test_help_and_version():
    for args in ([], ["--help"], ["help"]):
        done = call(*args)
        assert done.code == 0 and all(verb in done.out for verb in cli.VERBS)
    assert call("--version").out.startswith("headway 0.")
    for verb in cli.VERBS:
        done = call(verb, "--help")
        assert done.code == 0 and f"usage: headway {verb}" in done.out, verb


@pytest.mark.parametrize("asked", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_sleep_soon_unless_told_otherwise(monkeypatch, asked):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["headway", "--version"])
    with pytest.raises(SystemExit):
        cli.run()
    expected = asked.get("GOMP_SPINCOUNT", None if asked else cli.SPINS)
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_a_failed_run_exits_1(place, monkeypatch):
    from headway.config import RunError
    from headway.train import loop

    def fails(*_, **__):
        raise RunError("20 steps in a row were skipped")

    monkeypatch.setattr(loop, "train", fails)
    done = call("train", f"{place}/tiny.py:tiny", "--run", place / "runs" / "fails")
    assert done.code == 1 and done.err == "headway: 20 steps in a row were skipped\n"
