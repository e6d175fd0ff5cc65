"""`headway eval`."""

import json

import pytest

from tests.command import call, mistake


def test_eval_reads_run_and_checkpoint(run, place):
    whole = call("eval", run, "--json")
    assert whole.code == 0
    one = call("eval", run / "checkpoints" / "step-000006", "--json")
    assert one.json["val_bits_per_byte"] == whole.json["val_bits_per_byte"]
    quantiles, places = whole.json["loss_quantiles"], whole.json["loss_by_position"]
    assert quantiles["50"] < quantiles["99.9"] <= quantiles["max"] and "99.9%" in whole.out
    assert [row["first"] for row in places] == [0, 1, 2, 4, 8] and places[-1]["last"] == 15
    n = sum(row["targets"] for row in places)
    loss = sum(row["targets"] * row["nats"] for row in places) / n
    assert loss == pytest.approx(whole.json["val_loss"], rel=1e-6)
    bins, records = whole.json["calibration"], (run / "metrics.jsonl").read_text().splitlines()
    assert sum(row["n"] for row in bins) == n and "calibration error" in whole.out
    error = sum(row["n"] / n * abs(row["confidence"] - row["right"]) for row in bins)
    assert whole.json["calibration_error"] == pytest.approx(error)
    last = [r for r in map(json.loads, records) if "reliability" in r][-1]
    assert 0 < last["val_calibration_error"] < 1 and set(last["reliability"]) == set(bins[0])
    again = call("eval", run, "--tokens", 128, "--json").json["val_bits_per_byte"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [r["val_bits_per_byte"] for r in records if "val_bits_per_byte" in r][-1]
    # the same eight windows as in the loop, whose logits are bfloat16 on some CPUs
    assert again == pytest.approx(last, rel=1e-5)
    other = call("eval", run, "--data", place / "tiny.py", place / "text.txt", "--json")
    assert other.code == 2 or other.json["data"][0].endswith("tiny.py")
    assert "below 0" in mistake("eval", run, "--tokens", -1)


def test_a_server_gives_the_same_log_probabilities(run):
    pytest.importorskip("fastapi", reason="the extra [serve]")
    facts = call("eval", run, "--tokens", 256, "--dtype", "float32", "--via-http", "--json").json
    assert abs(facts["via_http_difference"]) < 1e-6 and facts["via_http_largest"] < 1e-5
    assert facts["via_http_tokens"] == 16 * 15  # all but the last of each window


def test_tasks_read_their_own_data(run):
    words = ("--tasks", "x.yaml", "--tokens", 64)
    assert "leave out --data, --tokens, --suite and --via-http" in mistake("eval", run, *words)
