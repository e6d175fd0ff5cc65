"""Sweeps of tiny runs; the workers are this process, but in one test."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from headway import recipes
from headway.checkpoint.lock import Holder
from headway.config import RunError, UsageError
from headway.lab import workers as module
from headway.lab.folder import TRIES, config_hash, read_result
from headway.lab.sweep import Sweep, resolved
from headway.lab.worker import work
from headway.lab.workers import Workers
from tests.command import call, mistake, write_recipe

GRID = """
def configs():
    results = []
    for lr in (1e-3, 3e-2):
        for heads in (1, 2):
            results.append((yield {"recipe": "tiny.py:tiny", "optim.lr": lr, "model.n_heads": heads}))
    best = min(results, key=lambda r: r["bits_per_byte"])
    yield {**best.item, "run.seed": 7}
"""

ONE = "def configs():\n    yield {'recipe': 'tiny.py:tiny'}\n"

KEEP = Workers.keep


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_recipe(tmp_path)
    (tmp_path / "grid.py").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    # in place of processes, which take seconds to import PyTorch
    monkeypatch.setattr(Workers, "keep", lambda self, open_: work(self.queue, ends=True))
    return tmp_path


def states(root):
    """Hash of each finished run → when its result was written, and the bits."""
    return {
        path.parent.name: (path.stat().st_mtime_ns, read_result(path.parent)["bits_per_byte"])
        for path in root.glob("runs/*/result.json")
    }


def test_an_adaptive_grid(place):
    done = call("sweep", "grid.py", "--json")
    assert done.code == 0, done.err
    value = done.json
    assert {k: value[k] for k in ("runs", "done", "failed", "reused", "started", "invalid")} == {
        "runs": 5, "done": 5, "failed": 0, "reused": 0, "started": 5, "invalid": [],
    }  # fmt: skip
    assert 0 <= value["overhead"] < 1
    rows = call("results", "sweep", "--json").json["rows"]
    assert value["best"]["config_hash"] == rows[0]["config_hash"]
    first = [row for row in rows if row["run.seed"] == 0]
    [again] = [row for row in rows if row["run.seed"] == 7]
    for name in ("optim.lr", "model.n_heads"):
        assert again[name] == first[0][name], "the best of the grid, with another seed"
    before = states(place / "sweep")
    value = call("sweep", "grid.py", "--json").json
    assert (value["reused"], value["started"], value["overhead"]) == (5, 0, None)
    assert states(place / "sweep") == before
    # what is missing is done again, and gives the same bits
    (place / "sweep" / "runs" / again["config_hash"] / "result.json").unlink()
    value = call("sweep", "grid.py", "--json").json
    assert (value["reused"], value["started"]) == (4, 1)
    assert {k: bits for k, (_, bits) in states(place / "sweep").items()} == {
        k: bits for k, (_, bits) in before.items()
    }


def test_the_same_config_runs_once(place):
    (place / "twice.py").write_text(
        "def configs():\n"
        "    a = yield {'recipe': 'tiny.py:tiny'}\n"
        "    b = yield {'recipe': 'tiny.py:tiny', 'run.dir': 'elsewhere'}\n"
        "    assert a.key == b.key and a['bits_per_byte'] == b['bits_per_byte']\n"
        "    assert a['attempts'] == 1 and set(a) == set(b)\n"
    )
    done = call("sweep", "twice.py", "--json")
    assert done.json["runs"] == done.json["started"] == 1 and "asked for twice" in done.out


def test_what_cannot_be_is_named_and_the_rest_runs(place):
    (place / "some.py").write_text(
        "def configs():\n"
        "    bad = yield {'recipe': 'tiny.py:tiny', 'model.n_heads': 3}\n"
        "    assert bad['bits_per_byte'] == float('inf') and 'n_heads' in bad['error']\n"
        "    yield {'recipe': 'tiny.py:tiny', 'optim.lr': 'fast'}\n"
        "    yield {'recipe': 'tiny.py:tiny', 'model.depth': 3}\n"
        "    lost = yield {'recipe': 'tiny.py:tiny', 'data.source': ('nowhere.txt',)}\n"
        "    good = yield {'recipe': 'tiny.py:tiny'}\n"
        "    assert lost['bits_per_byte'] == float('inf') > good['bits_per_byte']\n"
    )
    done = call("sweep", "some.py", "--json")
    assert done.code == 1, "a run was given up"
    value = done.json
    assert (value["runs"], value["done"], value["failed"]) == (2, 1, 1)
    assert len(value["invalid"]) == 3 and "optim.lr is a float, not 'fast'" in value["invalid"][1]
    [folder] = (p for p in (place / "sweep" / "runs").iterdir() if (p / "errors").is_file())
    lines = (folder / "errors").read_text().splitlines()
    assert len(lines) == TRIES and "nowhere.txt" in lines[-1]
    assert f"given up after {TRIES} tries: {folder.name}: {lines[-1]}" in done.out


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = 1", "has no function configs()"),
        ("def configs(): return [1]", "has a configs() that is none; a sweep is a generator"),
        ("def configs():\n    yield 3", "yields a int; yield a Config, or a dict"),
        ("def configs():\n    yield {}['a']", "file.py:2 raises KeyError: 'a'"),
        ("import nothing_here", "file.py:1 raises ModuleNotFoundError"),
        ("def configs(:", "raises SyntaxError"),
    ],
)
def test_files_that_are_no_sweep(place, text, said):
    (place / "file.py").write_text(text)
    assert said in mistake("sweep", "file.py")


def test_a_half_written_result_is_done_again(place):
    (place / "one.py").write_text(ONE)
    Sweep(place / "sweep", log=lambda _: None).run(place / "one.py")
    [(key, (_, bits))] = states(place / "sweep").items()
    path = place / "sweep" / "runs" / key / "result.json"
    path.write_text(path.read_text()[:200])
    again = Sweep(place / "sweep", log=lambda _: None).run(place / "one.py")
    assert (again["started"], again["done"], read_result(path.parent)["bits_per_byte"]) == (
        1,
        1,
        bits,
    )


def test_a_run_that_another_host_trains_is_waited_for(place, monkeypatch):
    """The progress line says where; when the lease is released the run is done here."""
    key = config_hash(resolved({"recipe": "tiny.py:tiny"}))
    lease = place / "s" / "runs" / key / "lease"
    lease.parent.mkdir(parents=True)
    holder = {**vars(Holder.of(1)), "host": "node7", "machine": "another"}
    lease.write_text(json.dumps(holder))
    lines = []

    def log(line):
        lines.append(line)
        lease.unlink(missing_ok=True)

    monkeypatch.setattr("headway.lab.sweep.PROGRESS_SECONDS", 0.3)
    (place / "one.py").write_text(ONE)
    value = Sweep(place / "s", log=log).run(place / "one.py")
    assert lines[0] == "0 of 1 done, 1 running (on node7), 0 failed" and value["done"] == 1


def test_a_full_disk(place):
    queue = Workers(place / "sweep", 1).queue
    queue.parent.mkdir(parents=True)
    queue.symlink_to("/dev/full")
    said = mistake("sweep", "grid.py")
    assert "sweep" in said and "No space left on device" in said


def test_other_mistakes(place):
    assert "there is no file none.py" in mistake("sweep", "none.py")
    assert "--workers 0" in mistake("sweep", "grid.py", "--workers", "0")
    (place / "sweep").write_text("a file")
    assert "sweep" in mistake("sweep", "grid.py")


def test_a_run_that_kills_its_workers_is_given_up(place, monkeypatch):
    """In place of workers: processes that take the lease of the run and die of it."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from headway.checkpoint.lock import Lock\n"
        "[folder] = Path('s', 'runs').iterdir()\n"
        "Lock(folder, 'lease').acquire(print)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    sweep = stand_in(place, monkeypatch, program)
    (place / "one.py").write_text(ONE)
    value = sweep.run(place / "one.py")
    assert (value["runs"], value["failed"]) == (1, 1)
    [folder] = (place / "s" / "runs").iterdir()
    assert (folder / "errors").read_text() == "its worker ended with -9\n" * TRIES


def test_a_sweep_of_which_nothing_is_valid_is_a_mistake(place):
    (place / "none.py").write_text(
        "def configs():\n    yield {'recipe': 'demo', 'optim.lrr': 1.0}\n"
    )
    done = call("sweep", "none.py", "--dir", "none")
    assert done.code == 2 and "there is no field optim.lrr; did you mean optim.lr?" in done.out


def test_workers_that_cannot_start_end_the_sweep(place, monkeypatch):
    sweep = stand_in(place, monkeypatch, "import headway_nothing")
    said = r"3 workers ended \(1\) while they trained nothing; .*No module named 'headway_nothing'$"
    with pytest.raises(RunError, match=said):
        sweep.run(place / "grid.py")
    assert "No module named 'headway_nothing'" in (place / "s" / "workers.log").read_text()


def test_workers_that_cannot_even_say_why_for_want_of_room(place, monkeypatch):
    sweep = stand_in(place, monkeypatch, "raise SystemExit(2)")
    (place / "s").mkdir()
    (place / "s" / f".room-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="cannot write .*s: No space left on device"):
        sweep.run(place / "grid.py")


def test_no_share_of_time_is_told_of_runs_that_others_trained(place, monkeypatch):
    def other(self, open_):
        work(self.queue, ends=True)
        for path in place.glob("sweep/runs/*/attempts"):
            path.write_text("node7 1\n")

    monkeypatch.setattr(Workers, "keep", other)
    value = call("sweep", "grid.py", "--json").json
    assert (value["done"], value["started"], value["overhead"]) == (5, 5, None)
    (place / "none.py").write_text("def configs():\n    yield from ()")
    value = call("sweep", "none.py", "--json").json
    assert (value["runs"], value["overhead"]) == (0, None)


def stand_in(place, monkeypatch, program: str) -> Sweep:
    """A sweep whose workers run this program."""
    monkeypatch.setattr(Workers, "keep", KEEP)
    monkeypatch.setattr(module, "COMMAND", [sys.executable, "-c", program])
    return Sweep(place / "s", log=lambda _: None)


def test_a_fork_is_true_or_false(place):
    with pytest.raises(UsageError, match="fork is a bool, not 'yes'"):
        resolved({"recipe": "tiny.py:tiny", "fork": "yes"})
    assert resolved({"recipe": "tiny.py:tiny", "fork": True}) == resolved(
        {"recipe": "tiny.py:tiny"}
    )


def test_the_clock_of_a_recipe_ends_no_run(place):
    assert recipes.load("demo").run.max_seconds > 0
    assert resolved({"recipe": "demo"}).run.max_seconds == 0
    assert resolved({"recipe": "demo", "run.max_seconds": 9.0}).run.max_seconds == 9


def test_runs_are_named_as_they_are_trained(place):
    """The supervisor resolves configs without PyTorch, `train` with it."""
    from headway.data.tokenizer import load_tokenizer
    from headway.train.resolve import resolve

    for item in (
        {"recipe": "demo"},
        {"recipe": "moe", "optim.steps": 7},
        {"recipe": "tiny.py:tiny"},
    ):
        config = resolved(item)
        vocab = load_tokenizer(config.data.tokenizer).vocab_size
        assert config_hash(resolve(config, vocab).config) == config_hash(config)


@pytest.mark.slow
def test_killed_and_called_twice_at_once(place):
    """Real processes: both supervisors of a folder are killed with their workers, then two share
    what is left."""
    command = [
        sys.executable,
        "-m",
        "headway",
        "sweep",
        "grid.py",
        "--dir",
        "s",
        "--workers",
        "2",
        "--json",
    ]

    def start():
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    first, runs = start(), place / "s" / "runs"
    while not list(runs.glob("*/result.json")):
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {p.parent.name: p.stat().st_mtime_ns for p in runs.glob("*/result.json")}
    pair = [start(), start()]
    values = [json.loads(p.communicate()[0].splitlines()[-1]) for p in pair]
    assert [p.returncode for p in pair] == [0, 0]
    assert [v["done"] for v in values] == [5, 5]
    after = states(place / "s")
    assert len(after) == 5 and all(after[k][0] == t for k, t in before.items())
    alone = Sweep(place / "alone", log=lambda _: None).run(place / "grid.py")
    assert alone["done"] == 5
    bits = {k: b for k, (_, b) in states(place / "alone").items()}
    assert bits == {k: b for k, (_, b) in after.items()}
