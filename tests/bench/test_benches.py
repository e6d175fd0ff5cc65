"""Every bench runs at an absurdly small size and ends with the JSON object that DESIGN.md demands."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import (
    cpu_kernels,
    cpu_step,
    hub,
    laws,
    plan_step,
    serve,
    serve_engine,
    serve_layer,
    serve_text,
    shakespeare,
    worlds,
)
from bench.common import ROOT, interleaved, target
from bench.worker import Worker
from headway.data.worlds.spec import TASKS
from headway.kernels.cpp import cpp_kernels

KEYS = {"bench", "machine", "versions", "commit", "rows", "targets"}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and so on.\n" * 200)
    yield text
    torch.set_num_threads(threads)


def last_line(main, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--json"])
    main()
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found.keys() >= KEYS
    return found


def test_shakespeare(path, capsys, monkeypatch):
    found = last_line(
        *(shakespeare.main, capsys, monkeypatch, "--quick", "--steps", "6", "--data", str(path)),
        *("--dir", str(path.parent / "runs")),
    )
    assert [row["name"] for row in found["rows"]] == [
        "control",
        "headway, 38% of the time",
        "headway, equal time",
        shakespeare.DENSE,
    ]
    assert found["rows"][0]["step"] == 6


def test_laws(capsys, monkeypatch):
    sizes = ("--runs", "20", "--bootstraps", "100", "--documents", "300")
    found = last_line(laws.main, capsys, monkeypatch, *sizes)
    kinds = [row["what"] for row in found["rows"]]
    assert kinds == ["law fit"] * len(laws.FORMS) + ["vendi"] + ["forecast"] * 3
    pinned, free, _ = found["rows"][-3:]
    assert pinned["low"] < pinned["loss"] < pinned["high"]
    assert free["high"] - free["low"] > pinned["high"] - pinned["low"], "free costs certainty"
    assert all(target["pass"] for target in found["targets"])


@pytest.mark.skipif(cpp_kernels().library is None, reason=cpp_kernels().why)
def test_cpu_kernels(capsys, monkeypatch):
    found = last_line(cpu_kernels.main, capsys, monkeypatch, "--small", "--repetitions", "1")
    assert len(found["rows"]) == 9 * (2 if cpp_kernels().bfloat16 else 1)
    for row in found["rows"]:
        ours, theirs = (
            row[f"{side} forward ms"] + row[f"{side} backward ms"] for side in ("ours", "pytorch")
        )
        assert row["speedup"] == pytest.approx(theirs / ours)
    assert cpu_kernels.MODULES[0].cpp_kernels is cpp_kernels


def test_serve_layer(capsys, monkeypatch):
    """Another reading of the weights would differ from the layer in float64, which it asserts."""
    pytest.importorskip("transformers")
    words = ("--small", "--repetitions", "1")
    found = last_line(serve_layer.main, capsys, monkeypatch, *words)
    sides = [(row["task"], row["side"]) for row in found["rows"]]
    assert sides == [(f, s) for f in ("1 token", "16 tokens") for s in ("headway", "grouped_mm")]
    error = {row["side"]: row["error"] for row in found["rows"]}
    assert 0 < error["headway"] < 4e-3 and 0 < error["grouped_mm"] < 1e-2


def test_serve_engine_compares_a_thread_with_two_and_busy_cores_with_quiet_ones():
    seconds = {(1, False): 4.0, (2, False): 2.0, (1, True): 8.0, (2, True): 10.0}
    rows: list[dict] = [
        {"shape": "S", "task": "decode", "threads": n, "busy": busy, "median": median}
        for (n, busy), median in seconds.items()
    ]
    rows.append({"side": "headway", "requests": 9, "changed": 1})
    rows.append({"side": "transformers", "requests": 9, "changed": 5})
    values = {t["name"]: (t["value"], t["pass"]) for t in serve_engine.targets(rows)}
    assert values == {
        "S decode: time with one thread / with two": (2.0, True),
        "S decode, 1 thread: speed on busy cores / quiet": (0.5, True),
        "S decode, 2 threads: speed on busy cores / quiet": (0.2, False),
        "texts of 9 requests that change in company": (1, False),
    }


def test_interleaved_takes_turns_and_drops_the_warm_up():
    calls = []
    kept = interleaved(
        {n: lambda n=n: calls.append(n) or {"i": len(calls)} for n in "ab"}, 2, warmup=1
    )
    assert calls == list("ababab")
    assert kept == {"a": [{"i": 3}, {"i": 5}], "b": [{"i": 4}, {"i": 6}]}


def test_target_compares_with_its_bound():
    assert target("x", 2.0, 2.0, True)["pass"] and not target("x", 1.9, 2.0, True)["pass"]
    assert target("x", 0.5, 0.5, False)["pass"] and not target("x", 0.6, 0.5, False)["pass"]
    assert target("x", float("inf"), 0.4, False) == {
        "name": "x",
        "value": None,
        "bound": 0.4,
        "at_least": False,
        "pass": False,
    }


def test_cpu_step_compares_with_the_fastest_peer():
    def row(name, rate, peak):
        return {"name": name, "tokens_per_second": rate, "peak_mib": peak}

    found = cpu_step.targets(
        [
            row("olmoe eager float32", 10.0, 100.0),
            row("olmoe grouped_mm float32", 20.0, 200.0),
            row("headway moe float32", 50.0, 150.0),
            row("headway moe float32 lean", 30.0, 80.0),
            row("headway multi_head_latent float32", 30.0, 90.0),
        ]
    )
    assert [(t["value"], t["pass"]) for t in found] == [
        (2.5, True),
        (0.75, False),
        (1.5, True),
        (0.45, True),
    ]


def test_a_worker_answers_and_reports_its_last_words():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bench.worker import work\n"
        "work(lambda: lambda i: {'i': i, 'half': 1 / (1 - i)})"
    )
    worker = Worker([sys.executable, "-c", code])
    first = worker.step()
    assert (first["i"], first["half"]) == (0, 1.0) and 0 <= first["peak_mib"] < first[
        "absolute_peak_mib"
    ]
    with pytest.raises(RuntimeError, match="division by zero"):
        worker.step()
    worker.close()


@pytest.mark.slow
def test_cpu_step(path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    found = last_line(
        cpu_step.main, capsys, monkeypatch, "--small", "--repetitions", "1", "--data", str(path)
    )
    assert {row["name"] for row in found["rows"]} >= {
        "olmoe grouped_mm float32",
        "headway moe float32",
        "headway multi_head_latent float32 lean",
    }


@pytest.mark.slow
def test_plan_step(path, capsys, monkeypatch):
    small = ("--repetitions", "1", "--steps", "3", "--seconds", "0.01", "--recipes", "dense")
    found = last_line(plan_step.main, capsys, monkeypatch, *small, "--data", str(path))
    (row,) = found["rows"]
    assert row["recipe"] == "dense" and row["ratio"] == row["predicted"][0] / row["measured"][0]
    assert sum(row["parts"][0].values()) == pytest.approx(row["predicted"][0])


def test_serve_text(capsys, monkeypatch):
    pytest.importorskip("llguidance")
    found = last_line(
        serve_text.main,
        capsys,
        monkeypatch,
        *"--vocab 300 --rows 2 --tokens 64 --repetitions 1".split(),
    )
    assert [row["what"] for row in found["rows"]] == ["draw"] * 6 + ["mask"] * 3 + ["text"] * 2
    assert len(found["targets"]) == 10


@pytest.mark.slow
def test_hub(capsys, monkeypatch):
    pytest.importorskip("transformers")
    tiny = replace(serve.SHAPES["S"], n_layers=1, d_model=96)
    monkeypatch.setitem(serve.SHAPES, "S", tiny)
    found = last_line(hub.main, capsys, monkeypatch, "--quick")
    assert [row["what"] for row in found["rows"]] == ["import", "ready", "ready"]
    assert found["rows"][0]["peak_memory_bytes"] > 0
    assert [t["name"] for t in found["targets"]] == [
        "import: peak memory / bound",
        "ready, shape S: time / from_pretrained",
    ]


def test_worlds(capsys, monkeypatch):
    found = last_line(worlds.main, capsys, monkeypatch, "--seconds", "0.001", "--repeats", "1")
    assert [row["task"] for row in found["rows"]] == TASKS.split(", ")
    assert all(row[k][0] > 0 for row in found["rows"] for k in ("train", "test", "lines"))
