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


def test_decode_of_a_recipe_and_of_a_run(run, place):
    words = ("--decode", "--batch", "1,3", "--json")
    recipe = call("describe", f"{place}/tiny.py:tiny", *words).json
    trained = call("describe", run, *words, "--bandwidth", 10).json
    assert [row["batch"] for row in trained["batches"]] == [1, 3]
    for a, b in zip(recipe["batches"], trained["batches"], strict=True):
        assert a["experts_touched"] == a["experts_touched_uniform"] == b["experts_touched_uniform"]
        assert 0 < b["experts_touched"] <= b["experts"]
        # two sequences of a step may choose the same experts, one chooses k different ones
        if b["batch"] == 1:
            assert b["experts_touched"] == a["experts_touched"]
        assert b["floor_seconds"] == pytest.approx(b["weight_bytes"] / 10e9)


def test_decode_mistakes(run):
    from tests.command import mistake

    assert "use 1,16" in mistake("describe", run, "--decode", "--batch", "1;2")
    assert "is a trained model" in mistake("describe", run, "--decode", "--optim.steps", "3")


def test_rates_that_follow_from_another_size_are_shown(place):
    recipe = f"{place}/tiny.py:tiny"
    wide = call("describe", recipe, "--optim.transfer", "width", "--optim.base-width", 8)
    assert (
        "  optim.transfer = width: rates hold as given at base_width 8 and base_layers 4"
        in wide.out
    )
    assert "  lr of head, fan-in " in wide.out
    long = call("describe", recipe, "--optim.transfer", "power")
    assert "  optim.lr = " in long.out and "√(B/B0)" in long.out
    assert "√(B/B0)" not in call("describe", recipe).out
