"""The metric table, the progress line and the load summary."""

import math
import re

import numpy as np
import pytest

from headway.report.metrics import METRICS, duration, load_summary, progress_line
from tests.report.fake_run import make_run

RECORD = {
    "step": 40,
    "tokens": 163840,
    "seconds": 12.5,
    "loss": 1.23456,
    "bits_per_byte": 1.78109,
    "lr": 3e-3,
    "grad_norm": 0.8432,
    "tokens_per_second": 15123.4,
    "flops_per_second": 3.1e11,
    "memory_gib": 0.8123,
    "skipped": 2,
    "balance_loss": 0.0101,
    "load_min": 0.41,
    "load_p95": 1.52,
    "load_max": 2.05,
    "dead": 3,
}


def test_progress_line_has_every_value():
    line = progress_line(RECORD, 600, 192.0)
    assert line == (
        "step  40/600  loss  1.2346  bits/byte  1.7811  lr 3.00e-03  grad  0.843  tokens/s  15123  "
        "GFLOP/s  310.0  mem 0.81 GiB  load min 0.41 p95 1.52 max 2.05  dead 3  skipped 2  eta 3m12s"
    )


def test_progress_line_keeps_its_fields_for_a_dense_run_and_for_gaps():
    dense = {k: v for k, v in RECORD.items() if not k.startswith("load") and k != "dead"} | {
        "loss": None
    }
    labels = re.compile(r"[a-zA-Z/]+[a-zA-Z/s95]*(?= )")
    full, short = progress_line(RECORD, 600, 1.0), progress_line(dense, 600, None)
    assert "load min - p95 - max -  dead -" in short
    assert "loss       -" in short and short.endswith("eta -")
    assert "\n" not in short
    assert labels.findall(full)[:8] == labels.findall(short)[:8]


def test_progress_line_prints_mfu_with_a_peak():
    line = progress_line(RECORD, 600, 1.0, peak_flops=6.2e11)
    assert "MFU  50.0%" in line and "GFLOP/s" not in line


def test_load_summary_equals_numpy():
    load = np.random.default_rng(0).gamma(2.0, 0.5, (3, 4, 16))
    load[1, 2, :5] = 0.0
    summary = load_summary(load)
    assert summary == load_summary(load.tolist())
    assert summary["load_min"] == 0.0
    assert summary["load_p95"] == np.percentile(load, 95)
    assert summary["load_max"] == load.max()
    assert summary["dead"] == 5


def test_load_summary_of_layers_of_different_shape_and_of_none():
    assert load_summary([[[0.5, 1.5]], [[0.0, 1.0, 2.0]]]) == {
        "load_min": 0.0,
        "load_p95": pytest.approx(1.9),
        "load_max": 2.0,
        "dead": 1,
    }
    assert load_summary([]) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59, "59s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (3900, "1h05m"),
        (183600, "2d03h"),
        (math.inf, "-"),
        (None, "-"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_table_names_each_recorded_number_once(tmp_path):
    names = [m.name for m in METRICS]
    assert len(set(names)) == len(names)
    from headway.report.sinks import read_metrics

    run = make_run(tmp_path / "run", steps=20, wire=True)
    recorded = {
        k
        for r in read_metrics(run / "metrics.jsonl")
        if "sample" not in r and "event" not in r
        for k in r
    }
    assert recorded - {"step", "tokens", "seconds"} == set(names)
