"""`headway describe`."""

import json

import pytest

from tests.command import call


def test_describe_equals_the_trained_model(run, place):
    done = call("describe", f"{place}/tiny.py:tiny", "--P", 2, "--json")
    assert done.code == 0
    counted = json.loads((run / "run.json").read_text())["parameters"]
    assert done.json["parameters"] == counted["total"]
    assert done.json["active_parameters"] == counted["active"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for r in (r for r in records if "loss" in r):
        per_token = r["flops_per_second"] / r["tokens_per_second"]
        assert per_token == pytest.approx(done.json["flops_per_token_training"], rel=1e-12)
    assert done.json["traffic_bytes_per_token_and_layer"]["Head Parallel"] == 4 * 16 * 2 // 2
    more = call("describe", f"{place}/tiny.py:tiny", "--model.moe.n-experts", 8, "--json").json
    assert (
        more["active_parameters"] == counted["active"] + 4 * 16
    )  # only the router grew: 4 rows of width 8, two heads
