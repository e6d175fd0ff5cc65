"""bench/lab.py at tiny sizes: every part without training gives rows and targets."""

import json
import sys

import pytest

from bench import lab


def test_parts_that_train_nothing(capsys, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(
        sys, "argv", ["lab", "--quick", "--only", "schedule,results,bootstrap", "--json"]
    )
    lab.main()
    value = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["part"], row.get("side") or row.get("asked")): row for row in value["rows"]}
    assert set(rows) == {
        ("schedule", "headway"), ("schedule", "optuna"), ("bootstrap", None),
        ("results", "all"), ("results", "where"), ("results", "group"),
    }  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows.values())
    ratio = rows["schedule", "headway"]["seconds"] / rows["schedule", "optuna"]["seconds"]
    by_name = {target["name"]: target["value"] for target in value["targets"]}
    assert by_name["sweep: 10 empty runs, time over optuna's"] == ratio
    assert len(value["targets"]) == 6
