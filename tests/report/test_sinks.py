"""The metrics file: valid JSON always, whole lines after a kill at any byte, cut back on resume."""

import json
import math
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from headway.config import UsageError
from headway.report.sinks import JsonlSink, read_metrics


def write(path, steps):
    with JsonlSink(path) as sink:
        for step in steps:
            sink.write({"step": step, "loss": 1.0 / step})


def test_non_finite_numbers_become_null_and_arrays_lists(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path) as sink:
        sink.write(
            {
                "step": np.int64(3),
                "loss": math.nan,
                "lr": np.float32(0.5),
                "ok": np.bool_(True),
                "load": np.array([[1.0, math.inf], [0.0, -math.inf]]),
                "deep": [{"x": (1, math.nan)}],
            }
        )
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {
        "step": 3,
        "loss": None,
        "lr": 0.5,
        "ok": True,
        "load": [[1.0, None], [0.0, None]],
        "deep": [{"x": [1, None]}],
    }


def test_any_text_is_one_line_that_comes_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    texts = ["a\nb\r\n", "</script>", "ü 世界 \u2028 \u0000", "\x85"]
    with JsonlSink(path) as sink:
        for text in texts:
            sink.write({"step": 1, "sample": text})
        sink.write({"step": 1, "sample": "lone \ud800"})
    records = read_metrics(path)
    assert [r["sample"] for r in records] == [*texts, "lone ?"]


def test_an_unknown_type_is_an_error(tmp_path):
    with JsonlSink(tmp_path / "metrics.jsonl") as sink, pytest.raises(TypeError, match="set"):
        sink.write({"step": {1}})


def test_every_cut_of_the_last_line_is_tolerated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    whole = path.read_bytes()
    first_two = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    last_start = whole[:-1].rfind(b"\n") + 1
    for cut in range(last_start, len(whole)):
        path.write_bytes(whole[:cut])
        complete = cut == len(whole) - 1  # only the newline is missing
        expected = first_two + ([{"step": 3, "loss": 1 / 3}] if complete else [])
        assert read_metrics(path) == expected
        with JsonlSink(path) as sink:
            sink.write({"step": 9})
        assert read_metrics(path) == [*expected, {"step": 9}]


def test_a_cut_inside_a_character_is_tolerated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "sample": "\xe4\xb8')
    assert read_metrics(path) == [{"step": 1}]


def test_a_corrupt_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2,\n{"step": 3}\n')
    with pytest.raises(
        UsageError, match=r"metrics\.jsonl line 2 is no JSON object.*delete that line"
    ):
        read_metrics(path)
    path.write_text('{"step": 1}\n[1]\n')
    with pytest.raises(UsageError, match="line 2"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"no metrics at {tmp_path}/none/metrics.jsonl"):
        read_metrics(tmp_path / "none" / "metrics.jsonl")
    with pytest.raises(UsageError, match="cannot read"):
        read_metrics(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UsageError, match=f"cannot write {tmp_path}/file/metrics.jsonl.*another folder"
    ):
        JsonlSink(tmp_path / "file" / "metrics.jsonl")


def test_resume_drops_later_lines_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(1, 11):
        sink.write({"step": step, "loss": 0.1 * step})
    sink.write({"step": 6, "event": "interrupted", "detail": ""})
    before = path.read_bytes().splitlines()
    assert sink.resume_at(6) == 4
    sink.write({"step": 7})
    sink.close()
    assert path.read_bytes().splitlines() == [*before[:6], before[10], b'{"step": 7}']
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    with JsonlSink(path) as again:
        assert again.resume_at(100) == 0
        assert again.resume_at(0) == 8
    assert read_metrics(path) == []


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write({"step": 1})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # the limit makes the kernel write a part of the line, then fail: as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, old[1]))
        with pytest.raises(OSError, match="large"):
            sink.write({"step": 2, "sample": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b'{"step": 1}\n'
    sink.write({"step": 3})
    sink.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]


def test_kill_9_loses_no_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys\nfrom headway.report.sinks import JsonlSink\nsink = JsonlSink(sys.argv[1])\nstep = 0\n"
        "while True:\n    step += 1\n    sink.write({'step': step, 'load': [[1.0] * 500]})\n    print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while int(process.stdout.readline()) < 50:
        pass
    os.kill(process.pid, signal.SIGKILL)
    told = [int(line) for line in process.stdout.read().split()]
    process.wait()
    steps = [r["step"] for r in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= max([50, *told])
